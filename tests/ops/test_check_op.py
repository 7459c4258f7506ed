"""The example at the top of check_op.py, and that check_op finds a kernel that is wrong."""

import pytest
import torch
from check_op import check_op, record

from pydeq import Picard
from pydeq.ops.picard_step import picard_step

OP = torch.ops.pydeq.picard_step.default


def samples():
    return record(Picard(), lambda z, k: z / 2 + 1, torch.zeros(1, 1), 3)


def test_the_example_worked_by_hand():
    z, f, next = zip(*((float(z), float(f), float(next)) for z, f, next, *_ in samples()), strict=True)
    assert (z, f, next[1:]) == ((0.0, 1.0, 1.5), (1.0, 1.5, 1.75), (0.0, 1.0))
    for (z, f, next, *others), expected in zip(samples(), (1.0, 1.5, 1.5), strict=True):
        picard_step.reference(z, f, next, *others)
        assert float(next) == expected
    check_op(OP, picard_step.reference, samples())


@pytest.mark.parametrize(("argument", "index"), [("next", 2), ("scalars", 4), ("progress", 6)])
def test_finds_an_argument_that_is_off(argument, index):
    def wrong(*arguments):
        picard_step.reference(*arguments)
        arguments[index].view(-1)[0] += 1

    with pytest.raises(AssertionError, match=f"sample 0, .*, {argument}: 1 of .* entries are off, at "):
        check_op(OP, wrong, samples())
    allowed = {argument: torch.ones(())}
    check_op(OP, wrong, samples(), lambda before, after: allowed)
