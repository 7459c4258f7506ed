"""Everything here needs a GPU that runs the CUDA kernels, and is skipped elsewhere."""

import os
import sys
from pathlib import Path

import pytest

# The operations' tests say what of an operation may differ by rounding, and make the arguments.
sys.path.insert(0, str(Path(__file__).parent.parent / "ops"))

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(autouse=True)
def nothing_is_left_undone():
    """A fault of one test is not to show in another."""
    import torch

    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            # After a kernel's fault nothing runs on a GPU in this process any more; pytest-xdist begins another.
            if "PYTEST_XDIST_WORKER" in os.environ:
                print(f"{os.environ['PYTEST_CURRENT_TEST']}: {error}", file=sys.__stderr__, flush=True)
                os._exit(1)
            raise
