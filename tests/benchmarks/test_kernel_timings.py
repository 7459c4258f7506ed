"""The steps that ``benchmarks/test_kernels.py`` times: kernel and reference get the same arguments, and agree."""

import pytest
import torch

from benchmarks.test_kernels import OPERATIONS, Step


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_a_step_that_is_timed_is_that_of_the_reference(operation):
    found, expected = Step(operation, 3, 40), Step(operation, 3, 40)
    found.workspace.step(found.f, found.before)
    expected.reference(*expected.arguments)
    torch.testing.assert_close(found.next, expected.next, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.workspace.counters, expected.workspace.counters)
