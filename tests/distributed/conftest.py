"""Two processes with a gloo group, started once, that tests send functions to."""

import pytest
import torch.distributed as dist
from world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """``world.run(function, *arguments)`` calls ``function(rank, *arguments)`` on both ranks."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo")
    world = World(tmp_path_factory)
    yield world
    world.stop()
