"""The progress protocol, with a thread as the device: it writes reports late, or never, as the test says."""

from __future__ import annotations

import ctypes
import itertools
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import small_models  # every model, small
import torch

import pydeq
from pydeq.ops import kernels
from pydeq.ops.constants import Progress
from pydeq.solve import iteration, step_reports
from pydeq.solve.step_reports import CapturedReports, HostReports, Pool, StreamReports
from pydeq.testing import CallCounter, assert_identical, linear_map, softsign_map, tanh_map

pytestmark = pytest.mark.kernels

WORKING, DONE = -1, -2
RHOS = [0.0, 0.3, 0.9, 0.99]


def write(address: int, steps: int, running: int, far: int = 0) -> None:
    """A device's report: how many samples run and are far from their tolerance, then how many steps are done."""
    report = (ctypes.c_int64 * len(Progress)).from_address(address)
    report[Progress.RUNNING] = running
    report[Progress.FAR] = far
    report[Progress.STEP] = steps


@dataclass
class FakeStream:
    """A device that a thread plays: tasks run one after another, each when the test lets it.

    Args:
        delay: Seconds before each task, drawn for each one.
        answer: What it says when asked; by default whether tasks are left.
    """

    delay: Callable[[], float] = lambda: 0.0
    answer: int | None = None
    asked: int = 0
    tasks: list = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    running: bool = True
    idled: int = 0

    def __post_init__(self) -> None:
        self.held.set()
        self.wake = threading.Condition()
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(self.query)
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def launch(self, task: Callable[[], None]) -> None:
        with self.wake:
            self.tasks.append(task)
            self.wake.notify_all()

    def work(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.tasks or not self.running)
                if not self.running:
                    return
            self.held.wait()
            time.sleep(self.delay())
            self.tasks[0]()
            with self.wake:
                self.tasks.pop(0)
                self.wake.notify_all()

    def query(self, stream: int | None, device: int) -> int:
        self.asked += 1
        if self.answer is not None:
            return self.answer
        return WORKING if self.tasks else DONE

    def drain(self) -> None:
        with self.wake:
            assert self.wake.wait_for(lambda: not self.tasks, timeout=20)

    def stop(self) -> None:
        self.held.set()
        with self.wake:
            self.running = False
            self.wake.notify_all()
        self.thread.join()

    def await_report(self, address: int, steps: int, idle: bool = False) -> int:
        """As the real one, but for whom it asks."""
        assert kernels._library is not None
        self.idled += idle
        query = ctypes.cast(self.callback, ctypes.c_void_p).value
        answer = kernels._library.await_report(address, steps, query, 0, 0, idle)
        return kernels.check_report(answer, steps, lambda code: f"error {code}")


@pytest.fixture
def stream():
    made = FakeStream()
    yield made
    made.stop()


class Memory:
    """Stands for pinned memory: kept for good, and counted."""

    def __init__(self) -> None:
        self.blocks: list = []

    def __call__(self, size: int) -> int:
        self.blocks.append(torch.full((size // 8,), -7, dtype=torch.int64))
        return self.blocks[-1].data_ptr()


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def pool(memory):
    return Pool(memory, kernels.has_reported)


# Waiting for one report


def test_a_report_that_is_there_is_not_waited_for(stream, memory):
    address = memory(64)
    write(address, 3, 5)
    assert stream.await_report(address, 3) == 5
    assert stream.await_report(address, 2) == 5
    assert stream.asked == 0


@pytest.mark.parametrize("delay", [0.0, 0.0002, 0.002, 0.05], ids=str)
def test_a_late_report_arrives(stream, memory, delay):
    address = memory(64)
    write(address, 0, 0)
    stream.delay = lambda: delay
    stream.launch(lambda: write(address, 1, 4))
    assert stream.await_report(address, 1) == 4


def test_the_stream_is_asked_now_and_then_and_not_all_the_time(stream, memory):
    address = memory(64)
    write(address, 0, 0)
    stream.delay = lambda: 0.05
    stream.launch(lambda: write(address, 1, 4))
    stream.await_report(address, 1)
    assert 1 <= stream.asked <= 501  # at least 100 us apart, over 50 ms


def test_other_threads_run_while_one_waits(stream, memory):
    """The fake device is such a thread: with the GIL held it would never report. So is this one."""
    address = memory(64)
    write(address, 0, 0)
    stream.held.clear()
    stream.launch(lambda: write(address, 1, 4))
    seen = []
    waiter = threading.Thread(target=lambda: seen.append(stream.await_report(address, 1)))
    waiter.start()
    assert not seen
    stream.held.set()
    waiter.join(timeout=20)
    assert seen == [4]


def test_a_fault_raises(stream, memory):
    address = memory(64)
    write(address, 0, 0)
    stream.answer = 700
    with pytest.raises(RuntimeError, match=r"GPU failed while step 0 .* or fn, was running: error 700\."):
        stream.await_report(address, 1)


def test_a_step_that_never_reports_raises(stream, memory):
    address = memory(64)
    write(address, 1, 4)
    with pytest.raises(RuntimeError, match="step 1 never reported"):
        stream.await_report(address, 2)


def test_a_report_beats_the_answer_that_came_with_it(stream, memory):
    """The last report may come between the look at it and the answer that all is done."""
    address = memory(64)

    def query(_stream: int | None, _device: int) -> int:
        write(address, 1, 4)
        return DONE

    stream.callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(query)
    write(address, 0, 0)
    assert stream.await_report(address, 1) == 4


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="only it is interrupted")
def test_an_interrupt_ends_a_wait(memory, interruptible):
    assert kernels._library is not None
    address = memory(64)
    write(address, 0, 0)
    main, raised = threading.get_ident(), threading.Event()

    def interrupt() -> None:
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)
        if not raised.wait(timeout=10):
            write(address, 1, 4)

    # Asked in C, where no interrupt is raised: close(-1) answers -1, as a stream does that still works.
    libc = ctypes.CDLL(None)
    query, stream = ctypes.cast(libc.close, ctypes.c_void_p).value, 2**64 - 1
    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        kernels._library.await_report(address, 1, query, stream, 0, False)
    raised.set()
    sender.join()


# Slots


def test_slots_are_cleared_and_lie_apart(pool, memory):
    slots = [pool.take() for _ in range(130)]
    assert len(memory.blocks) == 3
    addresses = sorted(address for slot in slots for address in slot.addresses)
    size = 8 * len(Progress)
    assert all(later - earlier >= size for earlier, later in itertools.pairwise(addresses))
    for slot in slots:
        for address, place in zip(slot.addresses, slot.places, strict=True):
            assert place.data_ptr() == address
            assert place.tolist() == [0, 0, 0]


def test_slots_of_inference_mode_serve_every_solve(memory):
    """A block that the first solve of a process made under inference_mode is written by solves outside of it, too."""
    pool = Pool(memory, kernels.has_reported)
    with torch.inference_mode():
        first = pool.take()
        assert not first.places[0].is_inference()
        first.places[0][Progress.RUNNING] = 3
        pool.give_back(first, 0)
    slots = [pool.take() for _ in range(64)]
    assert len(memory.blocks) == 1
    for slot in slots:
        slot.places[1].fill_(1)
        slot.clear()
        assert not slot.places[0].is_inference()
        assert slot.places[1].tolist() == [0, 0, 0]


def test_a_slot_is_used_again_only_after_its_last_step_has_reported(memory):
    pool = Pool(memory, kernels.has_reported)
    first = [pool.take() for _ in range(64)]  # a block
    for slot in first:
        write(slot.addresses[0], 1, 4)
        pool.give_back(slot, 2)
    assert {pool.take().addresses[0] for _ in range(64)}.isdisjoint(slot.addresses[0] for slot in first)
    write(first[7].addresses[1], 2, 4)
    again = pool.take()
    assert again.addresses == first[7].addresses
    assert [place.tolist() for place in again.places] == [[0, 0, 0], [0, 0, 0]]


def test_a_slot_without_steps_is_free_at_once(memory):
    pool = Pool(memory, kernels.has_reported)
    for _ in range(200):
        pool.give_back(pool.take(), 0)
    assert len(memory.blocks) == 1


# Solves on a device that is behind


@pytest.fixture
def on_device(monkeypatch, pool):
    """A function that makes solves report through a fake stream, which runs their steps late."""

    def place_on(stream: FakeStream) -> None:
        def open_reports(device, batch, place, lag):
            return StreamReports(batch, pool, stream, lag)

        class Late:
            """A workspace whose steps are taken at once, as far as fn can see, and reported late."""

            def __init__(self, workspace):
                self.inner = workspace

            def __getattr__(self, name):
                return getattr(self.inner, name)

            def step(self, f, k):
                self.launch(self.inner.step, f, k)

            def look_back(self, f, k, last):
                self.launch(self.inner.look_back, f, k, last)

            def launch(self, step, f, *more):
                address, batch = self.progress.data_ptr(), f.shape[0]
                self.inner.progress = torch.zeros(len(Progress), dtype=torch.int64)
                step(f, *more)
                report = self.inner.progress.tolist()
                assert report[Progress.FAR] <= report[Progress.RUNNING] <= batch
                stream.launch(lambda: write(address, *report))

        def evaluate(evaluator, flat, solver, rules, max_steps, trace, *more):
            class Start:
                def start(self, *args):
                    return Late(solver.start(*args))

            return original(evaluator, flat, Start(), rules, max_steps, trace, *more)

        original = iteration.iterate
        monkeypatch.setattr(iteration, "open_reports", open_reports)
        monkeypatch.setattr(sys.modules["pydeq.solve.solve"], "iterate", evaluate)

    return place_on


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("more", [{}, {"trace": True}, {"max_steps": 1}, {"max_steps": 2}, {"max_steps": 7}], ids=str)
def test_a_solve_on_a_late_device_is_the_same_but_for_one_call(solver, stream, on_device, more, seed):
    problem = softsign_map(RHOS, 9, seed=seed)
    ran = {"solver": solver, "rtol": 1e-4, "max_steps": 60, **more}
    expected = problem.solve(**ran)
    on_device(stream)
    source = random.Random(seed)
    stream.delay = lambda: source.choice((0.0, 0.0, 0.0003, 0.001))
    counter = CallCounter(problem.fn)
    actual = pydeq.fixed_point(counter, problem.z0, *problem.context, **ran)
    stream.drain()
    assert_identical(actual, expected)
    assert actual.nfe == counter.calls
    assert expected.nfe <= actual.nfe <= min(expected.nfe + 1, ran["max_steps"])
    assert torch.equal(actual.sample_nfe, expected.sample_nfe)
    if more.get("trace"):
        torch.testing.assert_close(actual.trace[: expected.nfe], expected.trace, rtol=0, atol=0, equal_nan=True)
        assert actual.trace[expected.nfe :].isnan().all()


class Plain(pydeq.CustomSolver):
    def propose(self, z, f, state):
        return f


def coupled(z, x, rate):
    """The second sample moves the first one, which is done early."""
    return rate * z + x + torch.cat([0.5 * z[1:2], 0.0 * z[1:2]])


@pytest.mark.filterwarnings("ignore::pydeq.CouplingWarning")
@pytest.mark.parametrize("fn", [softsign_map(RHOS, 9).fn, coupled], ids=["independent", "coupled"])
@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [(Plain(), pydeq.Implicit()), (pydeq.Picard(), pydeq.Unrolled()), (pydeq.Anderson(), pydeq.Unrolled())],
    ids=lambda part: type(part).__name__,
)
def test_steps_that_have_reported_when_they_return_cost_no_call(fn, solver, adjoint, stream, pool, monkeypatch):
    """Of solvers in plain torch on a GPU: the loop has no reason to be ahead of the device."""
    problem = softsign_map(RHOS, 9, dtype=torch.float64)
    z0, context = problem.z0, problem.context
    if fn is coupled:
        rate = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
        z0, context = z0[:2], (torch.ones_like(z0[:2]), rate)
    counter = CallCounter(fn)
    deq = pydeq.DEQ(counter, solver=solver, adjoint=adjoint, rtol=1e-6, max_steps=300)
    lags = []

    def solve():
        counter.batches.clear()
        return deq(z0, *context, return_solution=True)[1], counter.calls

    def open_reports(device, batch, place, lag):
        lags.append(lag)
        return StreamReports(batch, pool, stream, lag)

    expected, calls = solve()
    monkeypatch.setattr(iteration, "open_reports", open_reports)
    actual, again = solve()
    assert lags == [0]
    assert again == calls
    assert actual.nfe == expected.nfe == int(expected.sample_nfe.max())
    assert expected.status.eq(int(pydeq.Status.CONVERGED))[:2].all()
    assert_identical(actual, expected)


def test_calls_do_not_depend_on_how_late_the_device_is(solver, stream, on_device):
    problem = softsign_map(RHOS, 9)
    on_device(stream)
    calls = set()
    for delay in (0.0, 0.0, 0.0005, 0.004):
        stream.delay = lambda delay=delay: delay
        calls.add(problem.solve(solver=solver, rtol=1e-3).nfe)
        stream.drain()
    assert len(calls) == 1


def test_one_step_is_under_way_while_fn_is_called(stream, on_device):
    """The device here takes a step only once fn was called after it: a loop that waited for it would wait for good.

    All samples are far from their tolerance; only the first step is waited for, which may be the last.
    """
    problem = linear_map(1.0 - 1e-3, 9)
    on_device(stream)
    permits = threading.Semaphore(0)
    starved = []

    def delay():
        if not permits.acquire(timeout=10):
            starved.append(True)
        return 0.0

    stream.delay = delay
    depths = []
    permits.release(2)  # the first two steps are waited for

    def fn(z, *context):
        depths.append(len(stream.tasks))
        if len(depths) > 3:
            permits.release()
        return problem.fn(z, *context)

    pydeq.fixed_point(fn, problem.z0, *problem.context, solver=pydeq.Picard(), rtol=1e-9, max_steps=12)
    permits.release(2)
    stream.drain()
    assert stream.idled == 2
    assert not starved
    # One more where the device has not yet put its last step away.
    assert all(depth <= 1 for depth in depths[:3])
    assert all(1 <= depth <= 2 for depth in depths[3:])


@pytest.mark.parametrize(
    "more", [{"freeze": False}, {"compact": True, "batched_context": (True, True)}], ids=["freeze", "compact"]
)
def test_without_freezing_or_compacting_nothing_is_under_way(stream, on_device, more):
    problem = softsign_map(RHOS, 9)
    ran = {"rtol": 1e-4, "max_steps": 60, **more}
    expected = problem.solve(**ran)
    on_device(stream)
    stream.delay = lambda: 0.0005
    actual = problem.solve(**ran)
    assert_identical(actual, expected)
    assert actual.nfe == expected.nfe


@pytest.mark.parametrize("at", [0, 3, 5])  # the first two steps are waited for
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_cell_that_raises_leaves_steps_that_still_report(stream, on_device, pool, memory, at, error):
    problem = linear_map(1.0 - 1e-3, 9)
    on_device(stream)
    calls = 0

    def fn(z, *context):
        nonlocal calls
        calls += 1
        if calls == at:
            stream.drain()
            stream.held.clear()  # the step that follows does not report
        if calls == at + 1:
            raise error("from fn")
        return problem.fn(z, *context)

    with pytest.raises(error, match="from fn"):
        pydeq.fixed_point(fn, problem.z0, *problem.context, solver=pydeq.Picard(), rtol=1e-9)
    abandoned = {slot.addresses[0] for slot, launched in pool._busy if launched}
    assert len(abandoned) == len(stream.tasks) == (at > 0)
    taken = {pool.take().addresses[0] for _ in range(80)}
    assert not taken & abandoned
    stream.held.set()
    stream.drain()
    assert pool.take()


def test_a_fault_ends_a_solve_and_its_slot_stays_away(stream, on_device, pool):
    problem = softsign_map(RHOS, 9)
    on_device(stream)

    def fn(z, *context):
        stream.held.clear()
        stream.answer = 719
        return problem.fn(z, *context)

    with pytest.raises(RuntimeError, match="error 719"):
        pydeq.fixed_point(fn, problem.z0, *problem.context, rtol=1e-6)
    (lost,) = (slot for slot, launched in pool._busy)
    assert lost.addresses[0] not in {pool.take().addresses[0] for _ in range(100)}


def test_solves_in_threads_share_the_pool(on_device, stream, pool, memory):
    problem = softsign_map(RHOS, 9)
    expected = problem.solve(rtol=1e-4)
    on_device(stream)
    source = random.Random(0)
    stream.delay = lambda: source.choice((0.0, 0.0002))
    solutions: list = []

    def solve() -> None:
        solutions.extend(problem.solve(rtol=1e-4) for _ in range(3))

    threads = [threading.Thread(target=solve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(solutions) == 12
    for solution in solutions:
        assert_identical(solution, expected)
    stream.drain()
    assert len(memory.blocks) == 1


# The other kinds of reports


@pytest.mark.parametrize("batch", [1, 5])
def test_captured_steps_run_to_the_end(batch):
    place = torch.zeros(len(Progress), dtype=torch.int64)
    with CapturedReports(batch, place) as reports:
        for k in range(6):
            assert reports.running(k) == batch
            reports.place(k)[Progress.RUNNING] = 0


def test_steps_on_the_host_have_reported_when_they_return():
    place = torch.zeros(len(Progress), dtype=torch.int64)
    with HostReports(3, place) as reports:
        assert reports.running(0) == 3
        for step, running in enumerate((2, 0), start=1):
            reports.place(step - 1)[[Progress.STEP, Progress.RUNNING]] = torch.tensor([step, running])
            assert reports.running(step) == running


def test_a_step_that_does_not_report_is_an_error():
    place = torch.full((len(Progress),), 1)  # as left by another solve
    with (
        HostReports(3, place) as reports,
        pytest.raises(RuntimeError, match=r"step 0 of the solver did not report: .* pydeq\.CustomSolver"),
    ):
        reports.running(1)


def test_a_gpu_that_the_kernels_were_not_compiled_for_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "cuda_loaded", lambda: True)
    monkeypatch.setattr(kernels, "_compiled_archs", lambda: ("8.0", "9.0+PTX"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    step_reports._check_device.cache_clear()
    with pytest.raises(
        RuntimeError,
        match=r"cuda:1, Tesla T4, has compute capability 7\.5, .* compiled for 8\.0, 9\.0\+PTX: .*"
        r"TORCH_CUDA_ARCH_LIST=7\.5.*PYDEQ_KERNELS=off",
    ):
        step_reports.open_reports(torch.device("cuda", 1), 2, torch.zeros(len(Progress), dtype=torch.int64), 1)


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (("8.0",), [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        (("8.6",), [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (("9.0+PTX",), [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        (("9.0a",), [(9, 0)], [(10, 0), (8, 9)]),
        (("10.0f",), [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
        (("8.0", "12.0+PTX"), [(8, 9), (12, 0), (13, 0)], [(9, 0), (10, 0)]),
    ],
    ids=str,
)
def test_which_gpus_run_what_was_compiled(archs, runs, does_not, monkeypatch):
    monkeypatch.setattr(kernels, "_compiled_archs", lambda: archs)
    for capability in runs:
        kernels.check_capability(capability, "cuda:0")
    for capability in does_not:
        with pytest.raises(RuntimeError, match="compute capability"):
            kernels.check_capability(capability, "cuda:0")


def test_a_solve_on_a_gpu_without_kernels_says_so_once(monkeypatch):
    monkeypatch.delenv("PYDEQ_REQUIRE_KERNELS", raising=False)
    monkeypatch.delenv("PYDEQ_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_cuda_library", None)
    monkeypatch.setattr(kernels, "_cuda_reason", "no nvcc was found")
    monkeypatch.setattr(kernels, "_missed_cuda", False)
    place = torch.zeros(len(Progress), dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match=r"no CUDA kernels \(no nvcc was found\).*PYDEQ_WITH_CUDA=1"):
        reports = step_reports.open_reports(torch.device("cuda"), 2, place, 1)
    assert isinstance(reports, HostReports)
    assert isinstance(step_reports.open_reports(torch.device("cuda"), 2, place, 1), HostReports)  # silently
    monkeypatch.setenv("PYDEQ_REQUIRE_KERNELS", "1")
    with pytest.raises(ImportError, match="To run without them, unset PYDEQ_REQUIRE_KERNELS"):
        step_reports.open_reports(torch.device("cuda"), 2, place, 1)
    monkeypatch.setenv("PYDEQ_KERNELS", "off")
    assert isinstance(step_reports.open_reports(torch.device("cuda"), 2, place, 1), HostReports)


# How often fn is called


class PromptStream:
    """A device that has done each step when it is asked. How late one is makes no difference to the calls."""

    def __init__(self) -> None:
        self.waits = 0  # for steps that nothing is behind

    def launch(self, task: Callable[[], None]) -> None:
        task()

    def await_report(self, address: int, steps: int, idle: bool) -> int:
        report = (ctypes.c_int64 * len(Progress)).from_address(address)
        assert report[Progress.STEP] >= steps
        self.waits += idle
        return report[Progress.RUNNING]


def calls_of_solves() -> list[int]:
    """nfe of solves as people run them: forward and adjoint, of maps and models, easy and hard, exhausted and not."""
    calls = []
    solvers = (pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden(), pydeq.GMRES())
    for solver, rho, dim, rtol, seed in itertools.product(
        solvers, (0.0, 0.3, 0.9, 0.99), (9, 40), (1e-2, 1e-3, 1e-5), (0,)
    ):
        ran = {"solver": solver, "rtol": rtol, "max_steps": 60}
        for make in (linear_map, tanh_map, softsign_map):
            calls.append(make(rho, dim, seed=seed).solve(**ran).nfe)
    for solver, rho, backward_rtol in itertools.product(solvers, (0.0, 0.3, 0.9), (1e-2, 1e-4)):
        problem = tanh_map(rho, 40)
        x = problem.context[0].clone().requires_grad_()
        adjoint = pydeq.Implicit(solver=solver, rtol=backward_rtol)
        deq = pydeq.DEQ(problem.fn, solver=solver, adjoint=adjoint)
        z, solution = deq(problem.z0, x, return_solution=True)
        z.pow(3).sum().backward()
        calls += [solution.nfe, solution.backward.nfe]
        warm, again = deq(solution.value, x, return_solution=True)  # starts solved
        (0.0 * warm).sum().backward()
        calls += [again.nfe, again.backward.nfe]
    for case, rtol in itertools.product(small_models.CASES.values(), (1e-2, 1e-3, 1e-5)):
        model = case.make(solver={"rtol": rtol, "max_steps": 30})
        output, solution = model(*case.inputs(torch.Generator().manual_seed(3)), return_solution=True)
        case.loss(output).backward()
        calls += [solution.nfe, solution.backward.nfe]
    return calls


@pytest.mark.filterwarnings("ignore::pydeq.ConvergenceWarning")
def test_calls_on_a_device_are_those_on_the_cpu(on_device):
    """Nearly always, and never more than one more; and it does not wait all the time for that."""
    expected = calls_of_solves()
    stream = PromptStream()
    on_device(stream)
    actual = calls_of_solves()
    assert len(actual) == len(expected) > 400
    more = [one - other for one, other in zip(actual, expected, strict=True)]
    print(f"{more.count(0)} of {len(more)} solves alike, {stream.waits} waits in {sum(actual)} evaluations")
    assert set(more) <= {0, 1}
    assert more.count(0) >= 0.98 * len(more)
    assert stream.waits < 0.75 * sum(actual)


def test_a_solve_that_starts_solved_calls_once(on_device, solver):
    """As an adjoint with a zero cotangent does, or a warm start."""
    on_device(PromptStream())
    assert pydeq.fixed_point(lambda z: 0.5 * z, torch.zeros(3, 4), solver=solver).nfe == 1
    assert pydeq.fixed_point(lambda z: 0.0 * z + 1.0, torch.zeros(3, 4), solver=solver).nfe == 2


@pytest.mark.filterwarnings("ignore::pydeq.CouplingWarning")
def test_rows_wake_on_a_device_as_on_the_cpu(stream, on_device, solver):
    def fn(z):
        return torch.stack([0.5 * z[0] + 1.0, torch.relu(z[0] - 1.0)])

    def solve():
        return [
            pydeq.fixed_point(fn, torch.zeros(2, 3), solver=solver, max_steps=max_steps, trace=True)
            for max_steps in (2, 3, 50)
        ]

    expected = solve()
    on_device(stream)
    stream.delay = lambda: 0.0003
    for one, other in zip(solve(), expected, strict=True):
        for name in ("status", "value", "image", "residual"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert other.nfe <= one.nfe <= other.nfe + 1
    stream.drain()
