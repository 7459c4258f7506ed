"""What no agreement can help: a rank fails while the others wait inside of fn. Ends the processes of ``world``."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import pydeq
from pydeq.solve import ranks


class BrokenError(Exception):
    pass


def break_communicating(rank):
    """The other rank is inside of fn's collective, and does not hear of the error before that times out."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    ranks.GRACE = timedelta(seconds=0.5)

    def fn(z):
        if rank == 1:
            raise BrokenError("no more")
        dist.all_reduce(torch.ones(1), group=group)
        return 0.5 * z

    with pytest.raises(BrokenError if rank == 1 else RuntimeError):
        pydeq.fixed_point(fn, torch.ones(2, 3), process_group=dist.group.WORLD)


def test_an_error_beside_a_collective_of_fn_still_surfaces(world):
    try:
        world.run(break_communicating)
    finally:
        world.stop(kill=True)  # the ranks are out of step, as anyone's would be
