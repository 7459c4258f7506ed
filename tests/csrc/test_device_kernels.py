"""The CUDA kernels, run by the emulator, against the references of their operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_anderson_step
import test_broyden_step
import test_gmres_step
import test_picard_step
import test_squared_norm
import torch
import traffic
from check_op import DTYPES, SCALES, bits, compare, run
from emulated import Case, Limits, Result, emulate

from pydeq.ops.anderson_step import anderson_step
from pydeq.ops.broyden_step import broyden_step
from pydeq.ops.constants import RUNNING, Counter, CudaPath, Distribution, Progress, Status
from pydeq.ops.gmres_step import gmres_step
from pydeq.ops.picard_step import picard_step
from pydeq.ops.random_probes import random_probes_reference
from pydeq.ops.squared_norm import squared_norm_reference

MODULES = {
    "picard_step": test_picard_step,
    "anderson_step": test_anderson_step,
    "broyden_step": test_broyden_step,
    "gmres_step": test_gmres_step,
}
REFERENCES = {
    "picard_step": picard_step.reference,
    "anderson_step": anderson_step.reference,
    "broyden_step": broyden_step.reference,
    "gmres_step": gmres_step.reference,
}
# One launch, by a block or by a cluster of two that takes its tiles in turns, and two launches. Tiles have 256 entries.
PATHS = {"block": Limits(), "cluster": Limits(cluster_blocks=2), "split": Limits(block_state=-1)}
# A pack, a tile, and their neighbours; several tiles and a rest.
SIZES = (1, 3, 4, 9, 255, 256, 257, 511, 513, 1100)
NOTHING_FITS = 6 << 10  # bytes of shared memory that leave no room for rows

every_step = pytest.mark.parametrize("name", MODULES)
every_path = pytest.mark.parametrize("path", PATHS)


def cases(name: str, limits: Limits = PATHS["split"], offset: int = 0, seed: int = 0, **options) -> list[Case]:
    """A case for each step of a solve."""
    module = MODULES[name]
    return [
        Case(name, dict(zip(module.NAMES, sample, strict=True)), limits, seed + index, offset)
        for index, sample in enumerate(module.steps(**options))
    ]


def on(path: str, tests: list[Case], **more) -> list[Case]:
    """The cases on another path, and on another schedule."""
    seed = 1000 * list(PATHS).index(path)
    return [replace(case, limits=replace(PATHS[path], **more), seed=seed + case.seed) for case in tests]


def check(tests: list[Case]) -> list[Result]:
    """Every case leaves what the reference leaves, up to what the operation's own tests allow; on all paths the same
    bits. Returns what it leaves in two launches."""
    results = emulate(on("split", tests))
    for index, (case, result) in enumerate(zip(tests, results, strict=True)):
        module = MODULES[case.name]
        expected = run(REFERENCES[case.name], module.NAMES, tuple(case.arguments.values()))
        allowed = module.allowance(dict(case.arguments), expected)
        for key in module.NAMES:
            compare(f"{case.name} {index}, {key}", result.arguments[key], expected[key], allowed.get(key, 0.0))
    for path in ("block", "cluster"):
        for one, other in zip(results, emulate(on(path, tests)), strict=True):
            assert_same_bits(one.arguments, other.arguments)
    return results


@every_step
def test_equals_its_reference(name):
    options = {
        "picard_step": {"damping": 0.6},
        "anderson_step": {"damping": 0.6, "memory": 3},
        "gmres_step": {"restart": 3},
    }
    tests = []
    for dtype in DTYPES:
        tests += cases(name, dtype=dtype, dim=300, max_steps=9)
        tests += cases(name, dtype=dtype, dim=70, max_steps=9, **options.get(name, {"memory": 2}))
    check(tests)


def test_looks_back():
    tests = []
    for dtype in DTYPES:
        for sample in test_picard_step.looking_back(dtype, damping=0.6, last=dtype == torch.float64, dim=300):
            tests.append(Case("picard_step", dict(zip(test_picard_step.NAMES, sample, strict=True))))
    check(tests)


@every_step
def test_launches_and_clusters(name):
    """One launch where what the second pass needs again fits the shared memory of a block, or of a cluster."""
    tests = cases(name, dim=1100, max_steps=3)
    for path, launches, cluster in (("block", 1, 1), ("cluster", 1, 2), ("split", 2, 1)):
        for result in emulate(on(path, tests)):
            assert (result.launches, result.cluster) == (launches, cluster)
    # Tiles are spread over as many blocks as there are, up to the next lower power of two: here there are five.
    for most, cluster in ((4, 4), (8, 4)):
        assert {result.cluster for result in emulate(on("cluster", tests, cluster_blocks=most))} == {cluster}
    # A block may have that many entries.
    assert {r.launches for r in emulate(on("cluster", tests, cluster_blocks=4, block_state=512))} == {1}
    assert {r.launches for r in emulate(on("cluster", tests, cluster_blocks=2, block_state=512))} == {2}
    # The last step has no second pass over what a block would keep.
    assert {r.launches for r in emulate(on("block", tests[:-1], shared_bytes=NOTHING_FITS))} == {2}


@every_step
def test_every_path_can_be_forced_and_gives_the_same_bits(name):
    """Also where a GPU with few multiprocessors, or many, would choose another one."""
    tests = cases(name, dim=1100, max_steps=4, dtype=torch.bfloat16) + cases(name, dim=90, max_steps=3)
    several = torch.tensor([case.arguments["z"].shape[1] > 256 for case in tests])  # tiles
    expected = emulate(on("split", tests))
    for path, launches, cluster in ((CudaPath.BLOCK, 1, 1), (CudaPath.CLUSTER, 1, 2), (CudaPath.SPLIT, 2, 1)):
        for processors in (1, 10000):
            limits = Limits(cluster_blocks=2, block_state=256, multiprocessors=processors, path=path)
            results = emulate([replace(case, limits=limits, seed=case.seed + path) for case in tests])
            for one, other in zip(expected, results, strict=True):
                assert_same_bits(one.arguments, other.arguments)
            assert {result.launches for result in results} == {launches}
            assert {r.cluster for r, more in zip(results, several, strict=True) if more} == {cluster}


@every_step
def test_sizes(name):
    """Rows of most sizes are not aligned, from the second sample on."""
    tests = []
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            tests += cases(name, batch=2, dim=size, dtype=dtype, max_steps=4)
    check(tests)


@every_step
def test_states_of_no_entries(name):
    check(cases(name, batch=3, dim=0, max_steps=3))


@every_step
def test_memory_that_is_not_aligned(name):
    tests = []
    for dtype in (torch.float32, torch.float16):
        tests += cases(name, offset=dtype.itemsize, batch=3, dim=264, dtype=dtype, max_steps=5)
    check(tests)


@every_step
def test_scales(name):
    """Squares over- or underflow: norms and products are formed once more."""
    tests = []
    for dtype, scale in SCALES:
        tests += cases(name, dtype=dtype, scale=scale, max_steps=7, dim=260)
    check(tests)


@pytest.mark.parametrize("rules", [{"freeze": False}, {"stall": False}, {"atol": 1e-1}], ids=str)
def test_rules(rules):
    tests = []
    for name in MODULES:
        tests += cases(name, dtype=torch.float64, max_steps=20, dim=33, **rules)
    check(tests)


def test_memories():
    tests = []
    for memory in (1, 2, 7, 40):
        tests += cases("anderson_step", batch=3, memory=memory, max_steps=10 if memory < 40 else 38, dim=65)
    for memory in (1, 3, 40):
        tests += cases("broyden_step", batch=3, memory=memory, max_steps=10 if memory < 40 else 38, dim=65)
        tests += cases("gmres_step", batch=3, restart=memory, max_steps=10 if memory < 40 else 38, dim=65)
    check(tests)


@every_step
def test_small_grids_and_little_shared_memory(name):
    """Blocks go from sample to sample, and read again what they cannot keep; the results are the same bits."""
    for dim in (250, 520):  # one tile, of which a block keeps what it can; three
        tests = cases(name, dim=dim, max_steps=6)
        plain = emulate(tests)
        for path in PATHS:
            less = {} if path == "cluster" or (path == "block" and dim > 256) else {"shared_bytes": NOTHING_FITS}
            small = emulate(on(path, tests, max_blocks=2, **less))
            for one, other in zip(plain, small, strict=True):
                assert other.launches == (2 if path == "split" else 1)
                assert_same_bits(one.arguments, other.arguments)


@every_path
@every_step
def test_repeats_bit_for_bit_on_any_schedule(name, path):
    tests = on(path, cases(name, batch=4, dim=530, max_steps=5))
    first = emulate(tests)
    for seed in (100, 200):
        for one, other in zip(first, emulate([replace(case, seed=seed + case.seed) for case in tests]), strict=True):
            assert_same_bits(one.arguments, other.arguments)


@every_path
@every_step
def test_a_sample_does_not_depend_on_its_batch(name, path):
    tests = on(path, cases(name, batch=7, dim=530, max_steps=5))
    whole = emulate(tests)
    for b in (0, 3):
        alone = [replace(case, arguments=rows(case.arguments, [b])) for case in tests]
        for one, other in zip(whole, emulate(alone), strict=True):
            assert_same_bits(rows(one.arguments, [b]), other.arguments, but=("progress",))


@every_path
@every_step
def test_samples_that_are_done_are_left_alone(name, path):
    looked_at = 0
    for freeze in (True, False):
        tests = on(path, cases(name, dim=260, max_steps=14, freeze=freeze))
        for case, result in zip(tests, emulate(tests), strict=True):
            status = case.arguments["counters"][:, Counter.STATUS]
            done = (status == Status.MAX_STEPS) | (status >= Status.DIVERGED) | (freeze & (status != RUNNING))
            stopped = done.nonzero()[:, 0].tolist()
            looked_at += len(stopped)
            assert_same_bits(rows(case.arguments, stopped), rows(result.arguments, stopped), but=("progress",))
    assert looked_at > 10


@every_path
@every_step
def test_samples_that_are_done_cost_no_memory_traffic(name, path):
    *_, last = on(path, cases(name, batch=3, dim=300, max_steps=3))
    last.arguments["counters"][:, Counter.STATUS] = Status.CONVERGED
    (result,) = emulate([last])
    assert (result.loaded, result.stored) == (0, 0)
    assert result.arguments["progress"][: Progress.FAR].tolist() == [3, 0]


@pytest.mark.parametrize("path", traffic.PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_step
def test_reads_each_vector_once(name, dtype, path):
    """In one launch, and z and f twice in two; nothing is read that need not be. The residual falls in every step."""
    method = traffic.METHODS[name]
    for step in traffic.count(name, dtype, path, "falling"):
        assert (step.result.arguments["counters"][:, Counter.STATUS] == RUNNING).all()
        assert step.result.launches == (2 if path == "two launches" else 1)
        assert (step.result.cluster > 1) == (path == "cluster")
        assert step.reads <= 1.01 * (method.twice if path == "two launches" else method.once)(step.step)
        assert step.writes <= 1.01 * method.writes(step.step)


@pytest.mark.parametrize("path", traffic.PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_step
def test_traffic_of_a_solve_is_within_a_tenth_of_the_design(name, dtype, path):
    """Also where the best iterate is left behind and saved."""
    steps = traffic.count(name, dtype, path, "rising")
    moved = sum(step.reads + step.writes for step in steps)
    assert moved <= 1.1 * sum(sum(traffic.METHODS[name].design(step.step)) for step in steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms(dtype):
    tests = []
    for limits in (Limits(tile_threads=64), Limits(max_blocks=3)):
        for probes, batch, size in [
            (1, 1, 0),
            (1, 3, 1),
            (3, 2, 7),
            (2, 3, 511),
            (1, 3, 512),
            (5, 2, 513),
            (2, 3, 2100),
        ]:
            x = squared_norm_inputs(probes, batch, size, dtype)
            y = x.new_full((batch,), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
            tests.append(Case("squared_norm", {"x": x, "y": y}, limits, offset=size % 2 * dtype.itemsize))
    for case, result in zip(tests, emulate(tests), strict=True):
        x, y = case.arguments["x"], squared_norm_reference(case.arguments["x"])
        allowed = test_squared_norm.allowance({"x": x}, {"return": y})["return"]
        compare(f"{tuple(x.shape)}", result.arguments["y"], y, allowed)
        assert result.launches == 1
        assert result.loaded == x.numel() * x.element_size()


def test_a_mean_squared_norm_does_not_depend_on_its_batch():
    limits, x = Limits(), squared_norm_inputs(3, 4, 600)
    y = torch.full((4,), torch.nan)
    whole = Case("squared_norm", {"x": x, "y": y}, limits)
    alone = [Case("squared_norm", {"x": x[:, b : b + 1].contiguous(), "y": y[:1]}, limits, b + 1) for b in range(4)]
    first, *others = [result.arguments["y"] for result in emulate([whole, *alone])]
    assert torch.equal(bits(first), bits(torch.cat(others)))


PROBE_SIZES = (1, 2, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 513, 1100, 2500)
PROBE_SEEDS = (0, -1, 0x123456789ABCDEF0, -(2**63))


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_probes_are_those_of_the_cpu(dtype, distribution):
    """To the last bit; whatever is not written stays NaN."""
    tests = []
    for limits in (Limits(tile_threads=64), Limits(max_blocks=3)):
        for index, size in enumerate(PROBE_SIZES):
            out = torch.full((1 + index % 3, 1 + index % 2, size), torch.nan, dtype=dtype)
            key = torch.tensor(PROBE_SEEDS[index % len(PROBE_SEEDS)])
            arguments = {"out": out, "key": key, "distribution": int(distribution)}
            tests.append(Case("random_probes", arguments, limits, index, offset=index % 2 * dtype.itemsize))
    for case, result in zip(tests, emulate(tests), strict=True):
        out = case.arguments["out"]
        call = (out[0], case.arguments["key"], out.shape[0], int(distribution))
        drawn = bits(result.arguments["out"])
        assert torch.equal(drawn, bits(random_probes_reference(*call))), tuple(out.shape)
        assert torch.equal(drawn, bits(torch.ops.pydeq.random_probes(*call))), tuple(out.shape)
        assert result.launches == 1
        assert result.stored == out.numel() * out.element_size()


@every_path
@every_step
def test_nothing_races(name, path):
    memory = {"picard_step": {}, "gmres_step": {"restart": 2}}.get(name, {"memory": 2})
    tests = cases(name, batch=4, dim=270, max_steps=5, dtype=torch.float32, **memory)
    tests += cases(name, batch=4, dim=260, max_steps=4, dtype=torch.bfloat16, scale=1e-18)
    emulate(on(path, tests, max_blocks=6), "thread")


def test_squared_norm_does_not_race():
    x = squared_norm_inputs(3, 2, 700)
    tests = [Case("squared_norm", {"x": x, "y": torch.full((2,), torch.nan)}, Limits(), seed) for seed in range(5)]
    emulate(tests, "thread")


def squared_norm_inputs(probes: int, batch: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return test_squared_norm.inputs(probes * batch, size, dtype).view(probes, batch, size)


def rows(arguments: dict, index: list[int]) -> dict:
    """The arguments of some samples alone."""

    def part(name: str, value):
        if isinstance(value, list):
            return [part(name, entry) for entry in value]
        if not isinstance(value, torch.Tensor) or name == "progress" or not value.numel():
            return value
        return value[:, index] if name == "best" else value[index]

    return {name: part(name, value) for name, value in arguments.items()}


def assert_same_bits(one: dict, other: dict, but: tuple[str, ...] = ()) -> None:
    for name, value in one.items():
        if name not in but:
            pairs = zip(value, other[name], strict=True) if isinstance(value, list) else [(value, other[name])]
            for here, there in pairs:
                if isinstance(here, torch.Tensor):
                    assert torch.equal(bits(here), bits(there)), name
