"""Solves on a GPU: as on the CPU, without synchronizing, in graphs and on streams, through every kind of failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pydeq
from pydeq import Status
from pydeq.testing import CallCounter, Problem, assert_close, assert_identical, linear_map, softsign_map

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RHOS = [0.0, 0.3, 0.6, 0.9, 0.99, 1.5]


def to_gpu(problem: Problem, device: str = "cuda") -> Problem:
    """The problem with its tensors on a GPU; its map must take everything through context."""
    context = tuple(entry.to(device) for entry in problem.context)
    return Problem(problem.fn, problem.z0.to(device), context)


# As on the CPU


@pytest.mark.parametrize("dim", [9, 700, 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_as_on_the_cpu(solver, dtype, dim):
    """The map's image has the same bits on both; what the step sums up is rounded in another order."""
    problem = softsign_map([0.0, 0.3, 0.6, 0.9], dim, dtype=dtype)
    rtol = 64 * torch.finfo(dtype).eps
    ran = {"solver": solver, "rtol": rtol, "max_steps": 200}
    expected, actual = problem.solve(**ran), to_gpu(problem).solve(**ran)
    assert torch.equal(actual.status.cpu(), expected.status)
    assert (actual.status == Status.CONVERGED).all()
    # Both have a residual of rtol ||f||, and a contraction by 0.9 is off by up to ten of those.
    assert_close(actual.image.cpu(), expected.image, condition=10 * 64 * dim**0.5, dtype=dtype)
    assert (actual.sample_nfe.cpu() - expected.sample_nfe).abs().max() <= 3


def test_first_steps_are_those_of_the_cpu(solver):
    problem = softsign_map(RHOS, 300, dtype=torch.float64)
    ran = {"solver": solver, "rtol": 0.0, "max_steps": 5, "stall": False}
    expected, actual = problem.solve(**ran), to_gpu(problem).solve(**ran)
    assert_close(actual.image.cpu(), expected.image, size=300, condition=1e6)  # a ridge of 1e-6 conditions Anderson's


def test_finds_the_fixed_point_of_a_linear_map(solver):
    problem = linear_map(0.5, 60, dtype=torch.float64)
    basis = problem.fn(torch.eye(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)).cuda()
    x = problem.context[0].cuda()
    solution = pydeq.fixed_point(lambda z: z @ basis + x, torch.zeros_like(x), solver=solver, rtol=1e-12, max_steps=300)
    assert solution.converged.all()
    assert problem.solution is not None
    assert_close(solution.value.cpu(), problem.solution, size=60, condition=1e5)


def test_counts_calls_exactly_and_calls_at_most_once_too_often(solver):
    problem = to_gpu(softsign_map(RHOS[:5], 40))
    for max_steps in (1, 2, 3, 50, 400):
        counter = CallCounter(problem.fn)
        solution = pydeq.fixed_point(
            counter, problem.z0, *problem.context, solver=solver, rtol=1e-3, max_steps=max_steps, trace=True
        )
        needed = int(solution.sample_nfe.max())
        assert solution.nfe == counter.calls == len(solution.trace)
        assert needed <= solution.nfe <= min(needed + 1, max_steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [33, 10000])
def test_runs_repeat_and_samples_do_not_depend_on_their_batch(solver, dtype, dim):
    problem = to_gpu(softsign_map(RHOS, dim, dtype=dtype))
    ran = {"solver": solver, "rtol": 1e-4, "max_steps": 15}
    one = problem.solve(**ran)
    assert_identical(problem.solve(**ran), one)
    for rows in ([3], [5, 0], [2, 2, 4, 1, 3, 0, 5]):
        assert_identical(problem.rows(rows).solve(**ran), one, rows)


def test_a_nan_stays_in_its_sample(solver):
    problem = to_gpu(softsign_map(RHOS, 50))
    ran = {"solver": solver, "rtol": 1e-5, "max_steps": 12}
    expected = problem.solve(**ran)
    sick = Problem(problem.fn, problem.z0, (problem.context[0].clone(), problem.context[1]))
    sick.context[0][2, 7] = torch.nan
    solution = sick.solve(**ran)
    assert solution.status[2] == Status.NONFINITE
    rest = [0, 1, 3, 4, 5]
    for name in ("value", "image", "status", "residual"):
        assert torch.equal(getattr(solution, name)[rest], getattr(expected, name)[rest])


@pytest.mark.parametrize("more", [{"freeze": False}, {"compact": True, "batched_context": (True, True)}], ids=str)
def test_without_freezing_and_with_compaction(solver, more):
    problem = softsign_map(RHOS[:5], 40)
    ran = {"solver": solver, "rtol": 1e-4, "max_steps": 300, **more}
    actual = to_gpu(problem).solve(**ran)
    assert actual.converged.all()
    assert actual.nfe == int(actual.sample_nfe.max())


def test_a_tuple_of_tensors(solver):
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).cuda()
    y = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).cuda()

    def fn(z):
        return 0.5 * torch.sin(z[0]) + x, 0.3 * torch.cos(z[1]) + y + z[0].mean((1, 2))[:, None]

    solution = pydeq.fixed_point(fn, (torch.zeros_like(x), torch.zeros_like(y)), solver=solver, rtol=1e-5)
    assert solution.converged.all()
    for one, other in zip(fn(solution.value), solution.value, strict=True):
        assert_close(one, other, condition=1e3)


class Plain(pydeq.CustomSolver):
    def propose(self, z, f, state):
        return f


@pytest.mark.parametrize("freeze", [True, False])
def test_a_solver_of_a_user_that_returns_f_is_picard(freeze):
    problem = to_gpu(softsign_map(RHOS[:5], 300))
    ran = {"rtol": 1e-4, "max_steps": 300, "freeze": freeze}
    actual, expected = problem.solve(solver=Plain(), **ran), problem.solve(solver=pydeq.Picard(), **ran)
    assert_identical(actual, expected)
    assert actual.nfe == int(actual.sample_nfe.max())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.z0.clone()  # an empty graph is warned about
        with pytest.raises(RuntimeError, match="Plain cannot be captured into a CUDA graph"):
            problem.solve(solver=Plain(), **ran)


def gradients(device: str, solver, adjoint) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = (0.5 / 8 * torch.randn(64, 64, generator=generator, dtype=torch.float64)).to(device).requires_grad_()
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    deq = pydeq.DEQ(lambda z, x: torch.tanh(z @ weight + x), solver=solver, adjoint=adjoint, rtol=1e-12, max_steps=300)
    z, solution = deq(torch.zeros_like(x), x, return_solution=True)
    z.square().sum().backward()
    assert solution.converged.all()
    return [part.detach().cpu() for part in (z, weight.grad, x.grad)]


# An adjoint with the solver of its forward solve.
ADJOINTS = [
    (pydeq.Anderson(), pydeq.Implicit(rtol=1e-12)),
    (pydeq.Picard(), pydeq.Implicit(solver=pydeq.GMRES(), rtol=1e-12)),
    (pydeq.Broyden(), pydeq.Implicit(solver=pydeq.Broyden(), rtol=1e-12)),
    (pydeq.Anderson(), pydeq.Phantom()),
    (pydeq.Anderson(), pydeq.JacobianFree()),
    # What a solve has learned of the Jacobian differs by more than rounding; refined, it no longer matters.
    (pydeq.Broyden(memory=300), pydeq.Shine(refine_steps=100, rtol=1e-12)),
    (pydeq.Picard(), pydeq.Unrolled()),
    (pydeq.Picard(), pydeq.Unrolled(checkpoint=True)),
    (pydeq.Picard(), pydeq.Reversible(checkpoints=30)),
]


@pytest.mark.parametrize(("solver", "adjoint"), ADJOINTS, ids=repr)
def test_gradients_are_those_of_the_cpu(solver, adjoint):
    for actual, expected in zip(gradients("cuda", solver, adjoint), gradients("cpu", solver, adjoint), strict=True):
        assert_close(actual, expected, size=64, condition=1e4)


def test_shine_takes_all_steps_of_a_solve_whose_last_ones_have_not_reported():
    first = gradients("cuda", pydeq.Broyden(memory=300), pydeq.Shine())
    for _ in range(20):
        for actual, expected in zip(gradients("cuda", pydeq.Broyden(memory=300), pydeq.Shine()), first, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_jacobian_penalties_are_those_of_the_cpu(mode, distribution):
    """A seed drawn on the CPU gives the same probes on both."""
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        weight = (0.1 * torch.randn(40, 40, generator=generator, dtype=torch.float64)).to(device).requires_grad_()
        z = torch.randn(5, 40, generator=generator, dtype=torch.float64).to(device)
        options = {"probes": 3, "mode": mode, "distribution": distribution, "generator": generator}
        penalty = pydeq.jacobian_penalty(lambda z, weight: torch.tanh(z @ weight), z, weight, **options)
        (gradient,) = torch.autograd.grad(penalty, weight)
        found.append((penalty.detach().cpu(), gradient.cpu()))
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected, size=200, condition=1e2)


def test_spectral_radii_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(40, 40, generator=generator, dtype=torch.float64)
    z = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        options = {"method": "arnoldi", "steps": 40, "generator": torch.Generator().manual_seed(1)}
        there = z.to(device), weight.to(device)
        found.append(pydeq.spectral_radius(lambda z, weight: torch.tanh(z @ weight), *there, **options))
    assert_close(found[1].cpu(), found[0], size=40, condition=1e6)


def test_a_layer_under_autocast():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64).cuda()
    with torch.no_grad():
        linear.weight.mul_(0.3)
    deq = pydeq.DEQ(lambda z, x: torch.tanh(linear(z) + x))
    x = torch.randn(6, 64, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z, solution = deq(torch.zeros_like(x), x, return_solution=True)
    z.sum().backward()
    assert z.dtype == torch.float32
    assert solution.converged.all()
    assert linear.weight.grad is not None
    assert linear.weight.grad.isfinite().all()


# Without synchronizing


@pytest.fixture
def forbid_synchronizing():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_solve_does_not_synchronize(solver, forbid_synchronizing):
    torch.cuda.set_sync_debug_mode("default")
    problem = to_gpu(softsign_map(RHOS, 300))
    problem.solve(solver=solver)
    torch.cuda.set_sync_debug_mode("error")
    for trace in (False, True):
        solution = problem.solve(solver=solver, rtol=1e-5, trace=trace)
    torch.cuda.set_sync_debug_mode("default")
    assert solution.nfe > 2


@pytest.mark.parametrize("dim", [300, 30000])
def test_launches_and_copies_of_an_iteration(solver, dim):
    """At most two kernels of pydeq's per evaluation, no wait for the device, and nothing copied from it."""
    problem = to_gpu(softsign_map(RHOS, dim))
    ran = {"solver": solver, "rtol": 0.0, "stall": False}
    problem.solve(**ran, max_steps=20)
    torch.cuda.synchronize()
    counts = []
    for steps in (10, 20):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            problem.solve(**ran, max_steps=steps)
        names = [event.name for event in recorded.events()]
        ours = sum("step_fused_kernel" in n or "step_reduce_kernel" in n or "step_apply_kernel" in n for n in names)
        waits = sum("StreamSynchronize" in n or "EventSynchronize" in n or "DtoH" in n for n in names)
        counts.append((ours, waits))
    (short, waits_short), (long, waits_long) = counts
    assert 10 <= short <= 20
    assert 20 <= long <= 40
    assert waits_long == waits_short  # what there is of them is the profiler's own


def test_a_solve_is_captured_into_a_graph(solver):
    problem = to_gpu(softsign_map(RHOS, 300))
    x, quarter = problem.context
    ran = {"solver": solver, "rtol": 1e-4, "max_steps": 8}
    static = x.clone()

    def solve():
        return pydeq.fixed_point(problem.fn, problem.z0, static, quarter, **ran)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        solve()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve()
        status = captured.status
    assert captured.nfe == 8
    for seed in range(3):
        fresh = 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        static.copy_(fresh)
        graph.replay()
        expected = pydeq.fixed_point(problem.fn, problem.z0, fresh, quarter, **ran)
        assert torch.equal(captured.value, expected.value)
        assert torch.equal(captured.image, expected.image)
        assert torch.equal(status, expected.status)


# Streams, devices, threads


def test_a_solve_runs_on_the_current_stream(solver):
    problem = to_gpu(softsign_map(RHOS, 300))
    expected = problem.solve(solver=solver, rtol=1e-4)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Work of the default stream would not wait for this, nor does what follows wait for the default stream.
        x = problem.context[0].clone()
        torch.cuda._sleep(20_000_000)
        solution = pydeq.fixed_point(problem.fn, problem.z0, x, problem.context[1], solver=solver, rtol=1e-4)
    side.synchronize()
    assert_identical(solution, expected)


def test_threads_solve_side_by_side():
    problem = to_gpu(softsign_map(RHOS, 300))
    expected = problem.solve(rtol=1e-4)
    solutions: list = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                solutions.append(problem.solve(rtol=1e-4))
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(solutions) == 20
    for solution in solutions:
        assert_identical(solution, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_solve_on_another_than_the_current_device(solver):
    problem = softsign_map(RHOS, 300)
    expected = to_gpu(problem).solve(solver=solver, rtol=1e-4)
    solution = to_gpu(problem, "cuda:1").solve(solver=solver, rtol=1e-4)
    assert torch.cuda.current_device() == 0
    assert torch.equal(solution.value.cpu(), expected.value.cpu())
    with pytest.raises(ValueError, match="fn must return a tensor on the device of z0"):
        pydeq.fixed_point(lambda z: z.to("cuda:0"), problem.z0.to("cuda:1"))


# Failures


@pytest.mark.parametrize(("solver", "adjoint"), ADJOINTS, ids=repr)
def test_a_training_step_is_captured_into_a_graph(solver, adjoint):
    """Forward and backward, after an eager warm-up whose solves have left something to look at."""
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(64, 64)).cuda().requires_grad_()
    x = torch.randn(5, 64).cuda()
    deq = pydeq.DEQ(lambda z, x: torch.tanh(z @ weight + x), solver=solver, adjoint=adjoint, max_steps=8)
    # What warns of backward solves has something pending while the graph is captured.
    hasty = pydeq.DEQ(lambda z, x: torch.tanh(z @ weight + x), adjoint=pydeq.Implicit(max_steps=2, rtol=1e-12))

    def step():
        z = deq(torch.zeros_like(x), x)
        weight.grad = None
        z.square().sum().backward()
        return z, weight.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        hasty(torch.zeros_like(x), x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, gradient = step()
    for seed in range(3):
        x.copy_(torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        found = captured.clone(), gradient.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pydeq.ConvergenceWarning)  # of the hasty one
            expected = step()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::pydeq.CouplingWarning")
def test_rows_that_depend_on_each_other(solver, forbid_synchronizing):
    """They wake as on the CPU; a captured solve, which does not go on, tells which have moved."""

    def fn(z):
        return torch.stack([0.5 * z[0] + 1.0, torch.relu(z[0] - 1.0)])

    z0 = torch.zeros(2, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("default")
    for max_steps in (2, 3, 50):
        expected = pydeq.fixed_point(fn, z0.cpu(), solver=solver, max_steps=max_steps)
        torch.cuda.set_sync_debug_mode("error")
        actual = pydeq.fixed_point(fn, z0, solver=solver, max_steps=max_steps)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(actual.status.cpu(), expected.status)
        torch.testing.assert_close(actual.value.cpu(), expected.value, rtol=1e-4, atol=1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pydeq.fixed_point(fn, z0, solver=pydeq.Picard(), max_steps=12)
        status = captured.status
    graph.replay()
    assert status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    torch.testing.assert_close(captured.residual, (captured.image - captured.value).norm(dim=1))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_cell_that_raises_leaves_the_next_solve_alone(solver, at, error):
    problem = to_gpu(softsign_map(RHOS, 300))
    expected = problem.solve(solver=solver, rtol=1e-4)
    for _ in range(100):  # more often than there are slots in a block
        calls = 0

        def fn(z, *context):
            nonlocal calls
            calls += 1
            if calls == at:
                raise error("from fn")
            return problem.fn(z, *context)

        with pytest.raises(error, match="from fn"):
            pydeq.fixed_point(fn, problem.z0, *problem.context, solver=solver, rtol=1e-4)
    assert_identical(problem.solve(solver=solver, rtol=1e-4), expected)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="only it is interrupted")
def test_an_interrupt_ends_a_solve_that_waits(interruptible):
    problem = to_gpu(softsign_map(RHOS, 300))
    expected = problem.solve(rtol=1e-4)

    def fn(z, *context):
        torch.cuda._sleep(1_500_000_000)  # about a second
        return problem.fn(z, *context)

    main = threading.get_ident()
    sender = threading.Thread(target=lambda: (time.sleep(0.3), signal.pthread_kill(main, signal.SIGINT)))
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        pydeq.fixed_point(fn, problem.z0, *problem.context, rtol=1e-7)
    sender.join()
    assert_identical(problem.solve(rtol=1e-4), expected)


FAULT = """
import torch, pydeq
def fn(z):
    global calls
    calls += 1
    if calls == 3:
        rows = torch.full((len(z),), 10**6, device="cuda")
        return z[rows]  # asserts on the device
    return 0.9 * torch.cos(z)
calls = 0
try:
    pydeq.fixed_point(fn, torch.zeros(4, 50, device="cuda"), rtol=1e-7, max_steps=10**6, stall=False)
except RuntimeError as error:
    print("raised:", str(error).splitlines()[0])
"""


def test_a_fault_on_the_device_raises_and_does_not_hang():
    result = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=120)
    assert "raised:" in result.stdout, result.stderr[-2000:]


def test_the_references_solve_on_a_gpu(solver):
    """Where there are no CUDA kernels; they wait for the device in every step."""
    code = f"""
import torch, pydeq
assert not pydeq.kernels().cuda
x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).cuda()
solution = pydeq.fixed_point(lambda z: 0.7 * torch.cos(z) + x, torch.zeros_like(x), solver=pydeq.{solver!r}, rtol=1e-5)
assert solution.converged.all(), solution
assert solution.nfe == int(solution.sample_nfe.max())
"""
    environment = {**os.environ, "PYDEQ_KERNELS": "off"}
    environment.pop("PYDEQ_REQUIRE_KERNELS", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def test_kernels_say_that_they_run():
    facts = pydeq.kernels()
    assert facts.cuda
    assert facts.cuda_driver
    assert facts.cuda_built
    assert "compiled with CUDA" in str(facts)
