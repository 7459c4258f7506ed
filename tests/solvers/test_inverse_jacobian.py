"""Broyden's inverse Jacobian against the dense one from the same iterates, and against its own transpose."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pydeq import Broyden
from pydeq.ops.constants import DENOMINATOR_LIMIT, Counter, Status
from pydeq.solve.solve import solve_keeping_workspace
from pydeq.testing import linear_map, softsign_map, tanh_map, tolerance


def solve_and_record(problem, **options):
    """The solution, N, its pair counts, and what fn was given and returned, each [nfe, B, D]."""
    seen, images = [], []

    def fn(z, *context):
        seen.append(z.clone())
        images.append(problem.fn(z, *context))
        return images[-1]

    solver = options.pop("solver", Broyden())
    solution, workspace = solve_keeping_workspace(fn, problem.z0, problem.context, solver=solver, **options)
    counts = workspace.counters[:, Counter.COUNT].tolist()
    return solution, workspace.inverse_jacobian(), counts, torch.stack(seen), torch.stack(images)


def dense_inverse(z, f):
    """-H of dense good Broyden through all these iterates [n + 1, D], in float64.

    H+ = H + theta (s - H y) s^T H / (||s||^2 (1 - theta + theta d)),  d = s^T H y / ||s||^2
    """
    z, g = z.double(), f.double() - z.double()
    H = -torch.eye(z.shape[1], dtype=torch.float64)
    for k in range(len(z) - 1):
        s, y = z[k + 1] - z[k], g[k + 1] - g[k]
        squared = s @ s
        d = (s @ H @ y) / squared
        sign = -1.0 if d < 0 else 1.0
        theta = 1.0 if abs(d) >= DENOMINATOR_LIMIT else (1.0 - DENOMINATOR_LIMIT * sign) / (1.0 - d)
        H = H + theta * torch.outer(s - H @ y, s @ H) / (squared * (1.0 - theta + theta * d))
    return -H


def matrices(inverse, batch, dim, transpose):
    """N or N^T of each sample, from its products with unit vectors; [B, D, D]."""
    multiply = inverse.transpose_product if transpose else inverse.product
    units = torch.eye(dim, dtype=torch.float64)
    return torch.stack([multiply(units[j].expand(batch, dim).contiguous()) for j in range(dim)], dim=2)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 12])
def test_equals_the_dense_inverse_of_samples_with_different_counts(max_steps):
    problem = softsign_map([0.1, 0.5, 0.9, 1.0], 9, dtype=torch.float64)
    solution, inverse, counts, z, f = solve_and_record(problem, rtol=1e-4, max_steps=max_steps)
    assert max_steps < 12 or len(set(counts)) > 2
    N = matrices(inverse, 4, 9, transpose=False)
    for b, count in enumerate(solution.sample_nfe.tolist()):
        best = torch.linalg.vector_norm(f - z, dim=2)[:count, b].argmin() + 1 == count
        assert best  # then the last pair belongs to it
        torch.testing.assert_close(N[b], dense_inverse(z[:count, b], f[:count, b]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(matrices(inverse, 4, 9, transpose=True), N.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_steps", [2, 9])
def test_damped_updates_are_part_of_it(max_steps):
    """Where s^T J s is close to ||s||^2, denominators vanish."""
    problem = linear_map(0.9, 6, dtype=torch.float64)
    turn = torch.tensor([[0.95, 0.2], [-0.2, 0.95]], dtype=torch.float64)
    A = torch.block_diag(turn, turn.T, turn)
    problem = type(problem)(lambda z, x: z @ A.T + x, problem.z0, problem.context)
    solution, inverse, _, z, f = solve_and_record(problem, rtol=1e-9, max_steps=max_steps, stall=False)
    plain = 1.0 / inverse.gram.diagonal(dim1=1, dim2=2)
    damped = (inverse.weights != 0) & ((inverse.weights / plain - 1.0).abs() > 1e-6)
    assert bool(damped.any())
    N = matrices(inverse, 4, 6, transpose=False)
    for b, count in enumerate(solution.sample_nfe.tolist()):
        last = torch.linalg.vector_norm(f - z, dim=2)[:count, b].argmin() + 1 == count
        used = count if last else count - 1
        expected = dense_inverse(z[:used, b], f[:used, b])
        torch.testing.assert_close(N[b], expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


def test_where_the_last_evaluation_was_not_the_best_its_pair_is_left_out():
    problem = tanh_map(3.0, 8, batch=6, dtype=torch.float64)
    _, inverse, _, z, f = solve_and_record(problem, rtol=0.0, max_steps=6, stall=False)
    N = matrices(inverse, 6, 8, transpose=False)
    residuals = torch.linalg.vector_norm(f - z, dim=2)
    left_out = 0
    for b in range(6):
        last = int(residuals[:, b].argmin()) == 5
        left_out += not last
        used = 6 if last else 5
        expected = dense_inverse(z[:used, b], f[:used, b])
        torch.testing.assert_close(N[b], expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))
    assert 0 < left_out < 6  # both happen


@given(
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rates=st.lists(st.sampled_from([0.0, 0.2, 0.6, 0.95]), min_size=1, max_size=5),
    dim=st.sampled_from([1, 3, 40]),
    max_steps=st.integers(1, 14),
    seed=st.integers(0, 1000),
)
def test_the_transpose_is_the_transpose(dtype, rates, dim, max_steps, seed):
    problem = softsign_map(rates, dim, dtype=dtype, seed=seed)
    _, inverse, _, _, _ = solve_and_record(problem, rtol=1e-4, max_steps=max_steps)
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(len(rates), dim, generator=generator, dtype=dtype) for _ in range(2))
    Na, Nb = inverse.product(a), inverse.transpose_product(b)
    left, right = (Na * b).sum(1), (a * Nb).sum(1)
    # Rounding errors are relative to the vectors that are summed, factor by factor.
    size = Na.norm(dim=1) * b.norm(dim=1) + a.norm(dim=1) * Nb.norm(dim=1)
    weights = inverse.weights.abs().amax(1) if max_steps > 1 else torch.zeros(len(rates))
    growth = 1.0 + (weights * inverse.gram.abs().amax((1, 2)) if inverse.steps else weights)
    assert bool(((left - right).abs() <= tolerance(dtype, dim) * size * growth * 20).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_states_have_a_float32_inverse(dtype):
    problem = tanh_map(0.6, 16, dtype=dtype)
    solution, inverse, _, z, f = solve_and_record(problem, rtol=1e-2, max_steps=8)
    assert bool(solution.converged.all())
    v = torch.randn(4, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    assert inverse.newest.dtype == torch.float32
    assert inverse.transpose_product(v).dtype == torch.float32
    assert inverse.transpose_product(v.to(dtype)).dtype == dtype
    # fn sees rounded iterates; the solver's own are sums of steps.
    exact = torch.stack(list(accumulate([z[0].float(), *inverse.steps])))
    for b, count in enumerate(solution.sample_nfe.tolist()):
        expected = dense_inverse(exact[:count, b], f[:count, b]).T @ v[b].double()
        error = (inverse.transpose_product(v)[b].double() - expected).norm() / expected.norm()
        assert error < 1e-4


def test_a_lost_sample_leaves_the_others_as_they_are():
    problem = softsign_map([0.5, 0.9, 0.9], 7, dtype=torch.float64)
    v = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    _, clean, _, _, _ = solve_and_record(problem, rtol=1e-6, max_steps=30)
    for bad_from in (0, 2, 4):
        calls = 0

        def spoiled(z, *context, bad_from=bad_from):
            nonlocal calls
            calls += 1
            f = problem.fn(z, *context)
            if calls > bad_from:
                f[1] = torch.nan
            return f

        other = type(problem)(spoiled, problem.z0, problem.context)
        solution, inverse, _, _, _ = solve_and_record(other, rtol=1e-6, max_steps=30)
        assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
        u = inverse.transpose_product(v)
        assert bool(u.isfinite().all())
        torch.testing.assert_close(u[[0, 2]], clean.transpose_product(v)[[0, 2]], rtol=1e-12, atol=1e-13)


def test_what_autograd_keeps_is_all_there_is():
    problem = tanh_map(0.8, 12, dtype=torch.float64)
    _, inverse, _, _, _ = solve_and_record(problem, rtol=1e-6)
    v = torch.randn(4, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    again = type(inverse).from_tensors([tensor.clone() for tensor in inverse.tensors])
    assert torch.equal(again.transpose_product(v), inverse.transpose_product(v))
    assert torch.equal(again.product(v), inverse.product(v))


def test_a_restart_is_refused():
    problem = tanh_map(0.9, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"of 4 samples is lost: Broyden's memory of 2 .* to 28 or lower max_steps"):
        solve_and_record(problem, solver=Broyden(memory=2), rtol=1e-8, max_steps=30)


@pytest.mark.parametrize("max_steps", [3, 4, 5])
def test_a_memory_that_is_full_at_the_end_is_not(max_steps):
    problem = tanh_map(0.9, 12, dtype=torch.float64)
    solver = Broyden(memory=3)
    _, inverse, _, z, f = solve_and_record(problem, solver=solver, rtol=1e-12, max_steps=max_steps)
    N = matrices(inverse, 4, 12, transpose=False)
    for b in range(4):
        torch.testing.assert_close(N[b], dense_inverse(z[:, b], f[:, b]), rtol=1e-8, atol=1e-8)


def test_an_empty_batch():
    problem = tanh_map(0.9, 5, batch=0, dtype=torch.float64)
    _, workspace = solve_keeping_workspace(problem.fn, problem.z0, problem.context, solver=Broyden())
    assert workspace.inverse_jacobian().transpose_product(problem.z0).shape == (0, 5)


@pytest.mark.parametrize("max_steps", [1, 5, 60])
def test_does_not_depend_on_reports(max_steps):
    """On a GPU the last steps may not have reported yet, and the place of the report may be another solve's."""
    problem = softsign_map([0.3, 0.9], 40, dtype=torch.float64)
    made = []
    for report in (None, 0, 1000):
        _, workspace = solve_keeping_workspace(
            problem.fn, problem.z0, problem.context, solver=Broyden(), max_steps=max_steps
        )
        if report is not None:
            workspace.progress.fill_(report)
        made.append(workspace.inverse_jacobian().tensors)
    for other in made[1:]:
        assert len(other) == len(made[0])
        assert all(map(torch.equal, made[0], other))
