"""What all tests share: Hypothesis without randomness or deadlines, solvers, thread counts, the kernel marker."""

import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

import pydeq

settings.register_profile(
    "pydeq",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pydeq")

SOLVERS = (pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden(), pydeq.GMRES())


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: is about compiled kernels; skipped where the references run")
    config.addinivalue_line("markers", "cuda: needs a GPU that runs the CUDA kernels; skipped elsewhere")
    config.addinivalue_line("markers", "sanitize: run under compute-sanitizer by benchmarks/gpu_check.sh")
    # Most states here are too small to share out, and threads that spin for them only wait for each other on a busy
    # machine. What threads must not change is tested with the fixture below.
    torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("kernels") and not pydeq.kernels().cpu:
        pytest.skip("no compiled kernels are loaded")
    if item.get_closest_marker("cuda") and not pydeq.kernels().cuda:
        pytest.skip(f"no CUDA kernels run here: {pydeq.kernels().cuda_reason}")


# Module scope, for Hypothesis: nothing in a solver changes from example to example.
@pytest.fixture(scope="module", params=SOLVERS, ids=lambda solver: type(solver).__name__)
def solver(request):
    return request.param


@pytest.fixture
def threads():
    """A function that sets the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where pytest is a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a seed of its own, like the parameters of a fresh module, is the same in every run."""
    torch.manual_seed(0)
