"""GMRES against dense GMRES, step by step, and where it cannot help: stagnation, maps that are not affine."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pydeq
from pydeq import GMRES, Anderson, Status
from pydeq.ops.constants import MARGIN, Coordinate, Counter, Scalar
from pydeq.ops.termination import Rules
from pydeq.testing import Problem, assert_close, linear_map, tanh_map

DIM = 24


def gaussian(dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5


def rotations(rho, dim):
    """Complex pairs rho exp(+-i t), t spread over (0, pi)."""
    blocks = []
    for k in range(dim // 2):
        t = math.pi * (k + 0.5) / (dim // 2)
        blocks.append(rho * torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]).double())
    return torch.block_diag(*blocks)


def shift(dim):
    """e_i -> e_{i+1}, cyclic."""
    return torch.eye(dim, dtype=torch.float64).roll(1, 0)


EYE = torch.eye(DIM, dtype=torch.float64)
MATRICES = {
    "random 0.5": 0.5 * gaussian(DIM),
    "random 0.99": 0.99 * gaussian(DIM),
    "random 3": 3.0 * gaussian(DIM),
    "symmetric": linear_map(0.95, DIM, dtype=torch.float64).fn(EYE, 0.0),
    "skew": gaussian(DIM) - gaussian(DIM).T,
    "large skew": 10.0 * (gaussian(DIM) - gaussian(DIM).T),
    "not normal": torch.diag(torch.linspace(-0.8, 0.8, DIM)).double() + 0.3 * gaussian(DIM).triu(1) * DIM**0.5,
    "complex pairs": rotations(0.95, DIM),
    "nearly singular": torch.diag(torch.cat([torch.linspace(-0.5, 0.5, DIM - 1), torch.tensor([1.0 - 1e-6])])).double(),
    "nearly the identity": 0.99 * EYE + 1e-3 * gaussian(DIM),
}
every_matrix = pytest.mark.parametrize("A", MATRICES.values(), ids=list(MATRICES))


def affine(A, batch=2, dtype=torch.float64, seed=0):
    """f(z, v) = A z + v from zero, each sample with its own v and products that do not depend on the batch."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, len(A), generator=generator, dtype=torch.float64).to(dtype)
    narrow = A.to(dtype)
    solution = torch.linalg.solve(torch.eye(len(A), dtype=torch.float64) - A, v.double().T).T
    return Problem(lambda z, v: (narrow * z[:, None]).sum(2) + v, torch.zeros_like(v), (v,), solution.to(dtype))


def dense_gmres(A, v, count, restart):
    """Residual norms of one sample's smallest-residual points after each of ``count`` evaluations, in float64.

    By Arnoldi's process, orthogonalized twice, and dense least squares. A cycle of ``restart`` products ends in an
    evaluation of its solution, where the next one starts.
    """
    M = torch.eye(len(A), dtype=torch.float64) - A
    x, norms = torch.zeros_like(v), []
    while len(norms) < count:
        r = v - M @ x
        norms.append(float(r.norm()))
        Q, H = [r / r.norm()], torch.zeros(restart + 1, restart, dtype=torch.float64)
        for k in range(restart):
            w = M @ Q[k]
            for _ in range(2):
                for i, q in enumerate(Q):
                    H[i, k] += q @ w
                    w = w - (q @ w) * q
            H[k + 1, k] = w.norm()
            right = torch.zeros(k + 2, 1, dtype=torch.float64)
            right[0] = norms[-1 - k]
            t = torch.linalg.lstsq(H[: k + 2, : k + 1], right, driver="gelsd").solution
            norms.append(float((right - H[: k + 2, : k + 1] @ t).norm()))
            Q.append(w / w.norm())
            if len(norms) >= count:
                break
        x = x + torch.stack(Q[: len(t)], 1) @ t[:, 0]
    return torch.tensor(norms[:count], dtype=torch.float64)


def known_points(problem, restart, count, rtol=0.0):
    """After each step the point of smallest residual that every sample knows, [count, B, D], its known residual there,
    [count, B], and whether the cycle goes on, [count, B]."""
    eps = torch.finfo(problem.z0.dtype).eps
    workspace = GMRES(restart=restart).start(problem.z0, Rules(rtol, 0.0, eps, True, False), count + 2)
    points, known, open_ = [], [], []
    for k in range(count):
        workspace.step(problem.fn(workspace.z[k % 2], *problem.context), k)
        n = workspace.counters[:, Counter.COUNT]
        point, norm = workspace.z[1 - k % 2].double().clone(), torch.full((len(n),), torch.nan, dtype=torch.float64)
        for b, size in enumerate(n.tolist()):
            if size:
                V = torch.stack([vector[b] for vector in workspace.basis[:size]]).double()
                beta, x, rho = workspace.lengths[b], *(workspace.coordinates[b, :2, :size])
                point[b] = workspace.begin[b] + beta * (x @ V)
                norm[b] = beta * (rho @ V).norm()
        points.append(point)
        known.append(norm)
        open_.append(n > 0)
    return torch.stack(points), torch.stack(known), torch.stack(open_)


def residuals(problem, points):
    """||f(x) - x|| at points [count, B, D]."""
    return torch.stack([(problem.fn(x, *problem.context) - x).norm(dim=1) for x in points])


# The method


@every_matrix
@pytest.mark.parametrize("restart", [1, 2, 5, DIM])
def test_equals_dense_gmres(A, restart):
    """... after each evaluation, until a residual is close to rounding."""
    problem = affine(A)
    points, known, open_ = known_points(problem, restart, DIM)
    actual = residuals(problem, points)
    for b in range(2):
        expected = dense_gmres(A, problem.context[0][b], DIM, restart)
        norm = float((A @ problem.solution[b] + problem.context[0][b]).norm())
        until = int((expected > 1e-9 * norm).sum())
        assert until > 4
        assert (actual[:until, b] - expected[:until]).abs().max() < 1e-7 * expected[0]
        ongoing = open_[:until, b]
        assert (known[:until, b] - actual[:until, b])[ongoing].abs().max() < 1e-7 * expected[0]
        closed = [k for k in range(until) if not ongoing[k]]
        assert closed == list(range(restart, until, restart + 1))


@given(
    rho=st.floats(0.0, 5.0),
    dim=st.integers(1, 12),
    restart=st.integers(1, 12),
    skew=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_smallest_residual_never_grows(rho, dim, restart, skew, seed):
    """... from step to step, through restarts, whatever the affine map."""
    A = rho * gaussian(dim, seed)
    problem = affine(A - A.T if skew else A, seed=seed)
    points, known, open_ = known_points(problem, restart, 14)
    actual = residuals(problem, points)
    size = points.norm(dim=2).amax(0) + problem.context[0].norm(dim=1)
    rounding = 1e-10 * (1.0 + rho) * size
    assert actual.isfinite().all()
    assert (actual[1:] <= actual[:-1] + rounding).all()
    assert ((known - actual).abs()[open_] <= rounding.expand_as(actual)[open_]).all()


@every_matrix
def test_costs_at_most_two_evaluations_more_than_dense_gmres_has_products(A):
    """The first of z0, and the last of the solution, whose residual is measured and no estimate."""
    problem = affine(A, batch=3)
    for atol in (1e-1, 1e-4, 1e-7):
        solution = problem.solve(solver=GMRES(restart=DIM), rtol=0.0, atol=atol, max_steps=60)
        assert solution.converged.all()
        for b in range(3):
            norm = float(solution.image[b].norm())
            expected = dense_gmres(A, problem.context[0][b], DIM + 1, DIM)
            needed = int((expected > 0.99 * MARGIN * atol).sum())
            nfe = int(solution.sample_nfe[b])
            assert nfe <= needed + 2
            # No point of the Krylov space is better than GMRES's own.
            least = float(expected[min(nfe - 1, DIM)])
            assert float(solution.residual[b]) >= (1.0 - 1e-6) * least - 1e-12 * norm


@every_matrix
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_finds_the_solution(A, rtol):
    problem = affine(A, batch=4)
    solution = problem.solve(solver=GMRES(restart=DIM), rtol=rtol, max_steps=2 * DIM)
    assert solution.converged.all()
    inverse = torch.linalg.matrix_norm(torch.linalg.inv(EYE - A), ord=2)
    error = (solution.value - problem.solution).norm(dim=1)
    assert (error <= 1.01 * inverse * solution.residual).all()
    assert_close(solution.image, problem.fn(solution.value, *problem.context), size=DIM)


@pytest.mark.parametrize("restart", [1, 3, 8])
def test_restarts_converge_where_the_symmetric_part_is_definite(restart):
    """Elman 1982: every product then reduces the residual by a factor below 1."""
    A = 0.4 * gaussian(60) + 0.5 * (gaussian(60, 1) - gaussian(60, 1).T)
    definite = torch.linalg.eigvalsh(torch.eye(60, dtype=torch.float64) - 0.5 * (A + A.T))
    assert float(definite.min()) > 0.1
    solution = affine(A).solve(solver=GMRES(restart=restart), rtol=1e-10, max_steps=400)
    assert solution.converged.all()
    assert solution.nfe > 3 * restart  # it did restart


def test_the_last_evaluation_is_spent_on_the_smallest_residual():
    """Where the next point would be worse than the one it is from: for skew A with singular values beyond 3^.5."""
    A = torch.block_diag(*(s * (shift(2).tril() - shift(2).triu()) for s in range(3, 3 + DIM // 2)))
    problem = affine(A, batch=1)
    expected = dense_gmres(A, problem.context[0][0], DIM, DIM)
    for max_steps in range(3, DIM):
        solution = problem.solve(solver=GMRES(restart=DIM), rtol=1e-12, max_steps=max_steps)
        assert solution.status.tolist() == [Status.MAX_STEPS]
        assert float(solution.residual) == pytest.approx(float(expected[max_steps - 2]), rel=1e-9)
        assert_close((problem.fn(solution.value, *problem.context) - solution.value).norm(), solution.residual[0])


# Where the Krylov space ends, or is of no use


def test_no_jacobian_costs_two_evaluations():
    problem = affine(torch.zeros(5, 5, dtype=torch.float64))
    solution = problem.solve(solver=GMRES(), rtol=0.0)
    assert solution.converged.all()
    assert solution.nfe == 2
    assert torch.equal(solution.value, problem.context[0])


def test_a_start_at_the_solution_costs_one_evaluation():
    solution = pydeq.fixed_point(lambda z: 0.5 * z + 1.0, torch.full((3, 4), 2.0), solver=GMRES(), rtol=0.0)
    assert solution.converged.all()
    assert solution.nfe == 1


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_few_eigenvalues_end_the_krylov_space_early(distinct, dtype):
    basis = torch.linalg.qr(gaussian(DIM))[0]
    eigenvalues = torch.linspace(-0.9, 0.7, distinct).double().repeat(DIM)[:DIM]
    problem = affine((basis * eigenvalues) @ basis.T, dtype=dtype)
    solution = problem.solve(solver=GMRES(), rtol=64 * torch.finfo(dtype).eps, max_steps=40)
    assert solution.converged.all()
    assert solution.nfe <= distinct + 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_cyclic_shift_stagnates_until_the_whole_space_is_searched(dtype):
    """M = the shift of D: no smaller residual in fewer than D products (Nachtigal, Reddy and Trefethen 1992)."""
    dim = 12
    A = torch.eye(dim, dtype=torch.float64) - shift(dim)
    problem = affine(A, dtype=dtype)
    v = torch.zeros_like(problem.z0)
    v[:, 0] = 1.0
    whole = pydeq.fixed_point(problem.fn, problem.z0, v, solver=GMRES(restart=dim), max_steps=40)
    assert whole.converged.all()
    assert whole.nfe == dim + 2
    part = pydeq.fixed_point(problem.fn, problem.z0, v, solver=GMRES(restart=dim - 1), max_steps=40, trace=True)
    assert (part.status == Status.MAX_STEPS).all()
    assert (part.residual == 1.0).all()
    assert part.trace.isfinite().all()
    assert torch.equal(part.value, torch.zeros_like(v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_singular_systems(dtype):
    """Solved where a solution is in reach of the residual, else given up as MAX_STEPS with finite numbers."""
    eigenvalues = torch.linspace(-0.5, 0.5, DIM).double()
    eigenvalues[3] = 1.0
    problem = affine(torch.diag(0.0 * eigenvalues), dtype=dtype)
    A = torch.diag(eigenvalues).to(dtype)

    def fn(z, v):
        return z @ A + v

    v = problem.context[0]
    v[:, 3] = 10.0 * v.norm(dim=1)
    inconsistent = pydeq.fixed_point(fn, problem.z0, v, solver=GMRES(), rtol=1e-5, max_steps=60)
    assert (inconsistent.status != Status.CONVERGED).all()
    assert inconsistent.value.isfinite().all()
    assert (inconsistent.residual <= v.norm(dim=1) * 1.0001).all()
    consistent = v.clone()
    consistent[:, 3] = 0.0
    assert pydeq.fixed_point(fn, problem.z0, consistent, solver=GMRES(), rtol=1e-5, max_steps=60).converged.all()
    nowhere = pydeq.fixed_point(lambda z, v: z + v, problem.z0, v, solver=GMRES(), max_steps=30)
    assert (nowhere.status == Status.MAX_STEPS).all()
    assert torch.equal(nowhere.value, problem.z0)


@given(seed=st.integers(0, 500), rho=st.floats(0.5, 4.0), restart=st.integers(1, 10))
def test_a_map_that_is_not_affine_gets_a_status_that_is_true(seed, rho, restart):
    problem = tanh_map(rho, 10, dtype=torch.float64, seed=seed)
    solution = problem.solve(solver=GMRES(restart=restart), rtol=1e-6, max_steps=40)
    image = problem.fn(solution.value, *problem.context)
    residual = (image - solution.value).norm(dim=1)
    assert_close(solution.residual, residual, size=10, condition=1e3)
    assert_close(solution.image, image, size=10)
    assert (residual[solution.converged] <= 1.001e-6 * image.norm(dim=1)[solution.converged]).all()


# Rounding


@pytest.mark.parametrize("name", ["random 0.99", "skew", "complex pairs", "not normal", "nearly the identity"])
def test_float32_needs_hardly_more_evaluations(name):
    """A basis in float32 whose Gram matrix is known is as good as an orthonormal one."""
    wide, narrow = (affine(MATRICES[name], batch=4, dtype=dtype) for dtype in (torch.float64, torch.float32))
    ran = {"solver": GMRES(restart=DIM), "rtol": 1e-5, "max_steps": 60}
    expected, actual = wide.solve(**ran), narrow.solve(**ran)
    assert actual.converged.all()
    assert actual.nfe <= expected.nfe + (6 if name == "nearly the identity" else 2)


def test_the_gram_matrix_is_of_the_basis_as_stored():
    """... whose vectors classical Gram-Schmidt, once, leaves orthogonal to rounding over the new part of a residual."""
    for name, A in MATRICES.items():
        problem = affine(A, dtype=torch.float32)
        workspace = GMRES(restart=DIM).start(problem.z0, Rules(1e-6, 0.0, 1e-7, False, False), 40)
        for k in range(16):
            workspace.step(problem.fn(workspace.z[k % 2], *problem.context), k)
            for b, n in enumerate(workspace.counters[:, Counter.COUNT].tolist()):
                V = torch.stack([vector[b] for vector in workspace.basis[:n]]).double() if n else torch.zeros(0, 1)
                gram = workspace.gram[b, :n, :n]
                torch.testing.assert_close(gram, (V @ V.T).to(gram.dtype), rtol=1e-5, atol=1e-5)
                assert n == 0 or float((gram - torch.eye(n)).abs().max()) < 0.1, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_states_have_a_float32_basis(dtype):
    problem = linear_map(0.8, 30, dtype=dtype)
    workspace = GMRES().start(problem.z0, Rules(0.0, 0.0, 1e-3, True, False), 10)
    for k in range(4):
        workspace.step(problem.fn(workspace.z[k % 2], *problem.context), k)
        assert torch.equal(workspace.z[1 - k % 2], workspace.iterate.to(dtype))
    assert workspace.basis[0].dtype == torch.float32
    solution = problem.solve(solver=GMRES(), max_steps=60)
    assert solution.converged.all()
    assert solution.nfe <= linear_map(0.8, 30).solve(solver=GMRES(), rtol=1e-2, max_steps=60).nfe + 3


# As a solver among the others


def test_needs_fewer_evaluations_than_anderson():
    for rho, restart in ((0.9, 20), (0.95, 40)):
        problem = affine(rho * gaussian(64), batch=3)
        ran = {"rtol": 1e-6, "max_steps": 300}
        fast, slow = problem.solve(solver=GMRES(restart=restart), **ran), problem.solve(solver=Anderson(), **ran)
        assert fast.converged.all()
        assert slow.converged.all()
        assert fast.nfe < slow.nfe


def test_first_residuals_are_measured():
    problem = affine(MATRICES["random 0.5"])
    workspace = GMRES().start(problem.z0, Rules(1e-9, 0.0, 1e-16, True, True), 9)
    for k in range(5):
        z = workspace.z[k % 2].clone()
        f = problem.fn(z, *problem.context)
        workspace.step(f, k)
        assert_close(workspace.scalars[:, Scalar.RESIDUAL], (f - z).norm(dim=1), size=DIM)


def test_vectors_are_allocated_as_they_are_used():
    problem = affine(0.99 * gaussian(DIM))
    workspace = GMRES(restart=10**6).start(problem.z0, Rules(0.0, 0.0, 1e-16, True, True), 8)
    for k in range(8):
        workspace.step(problem.fn(workspace.z[k % 2], *problem.context), k)
    assert len(workspace.basis) == 7  # not 10**6
    assert workspace.coordinates.shape == (2, len(Coordinate), 7)
    torch.testing.assert_close(
        problem.solve(solver=GMRES(restart=10**6), max_steps=8, rtol=0.0).image,
        problem.solve(solver=GMRES(restart=8), max_steps=8, rtol=0.0).image,
        rtol=0.0,
        atol=0.0,
    )


@pytest.mark.parametrize(
    ("restart", "error", "message"),
    [
        (0, ValueError, "restart must be at least 1, got 0"),
        (2.0, TypeError, "restart must be an int, got float"),
        (True, TypeError, "restart must be an int, got bool"),
    ],
)
def test_bad_arguments(restart, error, message):
    with pytest.raises(error, match=message):
        GMRES(restart=restart)
