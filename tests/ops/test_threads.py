"""Operations compute the same bits on any number of threads, whichever way the work is shared out."""

import pytest
import torch
from check_op import DTYPES, compare, copy, mixed_map, record

import pydeq

pytestmark = pytest.mark.kernels  # torch's own sums, which the references use, depend on the number of threads

SOLVERS = (
    pydeq.Picard(damping=0.5),
    pydeq.Anderson(memory=3),
    pydeq.Broyden(memory=3),
    pydeq.GMRES(restart=3),
)


# Few samples of many chunks, many samples of one, many of a chunk and a bit; fewer than threads.
@pytest.mark.parametrize("shape", [(3, 20000), (33, 700), (9, 4097), (1, 40000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_steps(solver, dtype, shape, threads):
    op = getattr(torch.ops.pydeq, f"{type(solver).__name__.lower()}_step").default
    for index, sample in enumerate(record(solver, *mixed_map(*shape, dtype), 5)):
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(copy(sample))
            with torch.no_grad():
                op(*results[-1])
        for result in results[1:]:
            compare(f"step {index}", result, results[0], 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norm(dtype, threads):
    x = torch.randn(9, 40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for rows in (9, 3, 1):
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(pydeq.ops.squared_norm(x[:rows]))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[0][:1], pydeq.ops.squared_norm(x[:1]))


@pytest.mark.parametrize("distribution", pydeq.ops.constants.Distribution)
@pytest.mark.parametrize("shape", [(2, 3, 20000), (40, 5, 700)], ids=str)
def test_random_probes(distribution, shape, threads):
    probes, *like = shape
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(torch.ops.pydeq.random_probes(torch.empty(like), torch.tensor(1), probes, distribution))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
