"""Each contender solves small problems, is counted rightly, and does not claim what is false.

Those of JAX are checked in a process of their own: once JAX has started, Python warns of every fork in the process.
"""

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import benchmarks.peers
import pydeq
from benchmarks.peers import REQUIREMENTS, Counts, contenders
from benchmarks.peers.calling import Compiler, passes
from benchmarks.peers.loop import floor
from benchmarks.problems.base import Problem, from_formula
from benchmarks.problems.maps import diagonal, elementwise, symmetric_linear, tanh_map

JAX = ("jaxopt", "optimistix")
CHILD = "PYDEQ_TEST_CONTENDERS"
FOUND, NOTICES = contenders([os.environ[CHILD]] if CHILD in os.environ else [n for n in REQUIREMENTS if n not in JAX])

# Their first guess of the Jacobian has the wrong sign, so that they seldom get anywhere. They hand on the iterate
# before the one that passed.
UNABLE = {"xitorch.broyden1.default", "xitorch.broyden2.default"}


@pytest.fixture(params=FOUND, ids=lambda contender: contender.key)
def contender(request):
    return request.param


# The solvers of JAX that are mapped over the samples are the same solvers: each compiles for seconds in each test.
@pytest.fixture(params=[each for each in FOUND if not getattr(each, "mapped", False)], ids=lambda each: each.key)
def unmapped(request):
    return request.param


@pytest.mark.parametrize("library", JAX)
def test_jax_in_a_process_of_its_own(library):
    if CHILD in os.environ:
        pytest.skip("this is that process")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: {REQUIREMENTS[library]}")
    # Most of the time goes into compiling, and hardly any of it into what is compiled.
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment = os.environ | quick | {CHILD: library}
    arguments = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5_000:] + result.stderr[-5_000:]


@pytest.mark.parametrize("notice", NOTICES)
def test_absent(notice):
    pytest.skip(notice)


def solve(contender, problem):
    """The claim at the first tolerance at which the problem is solved, its counts, and the excess."""
    for tighten in (1.0, 0.1, 0.01):
        counts = Counts()
        claim = contender.prepare(problem, tighten, counts)()
        assert claim.value.shape == problem.z0.shape
        assert claim.value.dtype == problem.z0.dtype
        excess = problem.excess(claim.value).max().item()
        if excess <= 1.0:
            break
    return claim, counts, excess


PROBLEMS = {
    "linear": symmetric_linear(seed=7, dim=6, rho=0.5, batch=3),
    "tanh": tanh_map(dim=8, rho=0.6, seed=7, batch=3),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_solves(contender, name):
    if name == "linear" and getattr(contender, "mapped", False):
        return  # as above
    problem = dataclasses.replace(PROBLEMS[name], max_calls=300)
    assert contender.refusal(problem) is None
    claim, _, excess = solve(contender, problem)
    if contender.key in UNABLE:
        return
    assert excess <= 1.0
    assert claim.converged is None or claim.converged.all()


def cubic(dtype=torch.float64):
    """r(z) = A z + z^3 / 10 - b, with fn(z) = z - r(z) / 4."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 4, generator=generator, dtype=dtype)
    matrix = matrix @ matrix.T / 8 + torch.eye(4, dtype=dtype)
    b = torch.randn(2, 4, generator=generator, dtype=dtype)

    def root(xp, z, matrix, b):
        return z @ matrix + z**3 / 10 - b

    def formula(xp, z, matrix, b):
        return z - root(xp, z, matrix, b) / 4

    z0 = torch.zeros(2, 4, dtype=dtype)
    constants = {"matrix": matrix, "b": b}
    return from_formula(
        "cubic", "cubic", formula, z0, root=root, constants=constants, sample_axes={"b": 0}, rtol=1e-6, max_calls=400
    )


def test_finds_roots_in_float64(unmapped):
    problem = cubic()
    if unmapped.refusal(problem):
        return
    _, _, excess = solve(unmapped, problem)
    assert torch.get_default_dtype() == torch.float32
    assert excess <= 1.0 or unmapped.key in UNABLE


def test_solves_in_bfloat16_or_refuses(unmapped):
    def formula(xp, z, x):
        return 0.5 * z + x

    x = torch.linspace(-1.0, 1.0, 6, dtype=torch.bfloat16).reshape(2, 3)
    fields = {"constants": {"x": x}, "sample_axes": {"x": 0}, "rtol": 3e-2, "max_calls": 100}
    problem = from_formula("half", "half", formula, torch.zeros(2, 3, dtype=torch.bfloat16), **fields)
    refusal = unmapped.refusal(problem)
    assert (refusal == "NumPy has no bfloat16") == (unmapped.language == "numpy")
    if refusal is None and unmapped.key.split(".")[1] in ("picard", "fixed_point_iteration"):
        _, _, excess = solve(unmapped, problem)
        assert excess <= 1.0


def test_absolute_tolerance(unmapped):
    """The solution is 0, where no relative tolerance can be met."""
    slopes = torch.tensor([0.5, -0.3, 0.1])

    def formula(xp, z, slopes):
        return slopes * z

    problem = from_formula(
        "zero", "zero", formula, torch.ones(2, 3), constants={"slopes": slopes}, atol=1e-3, rtol=0.0, max_calls=300
    )
    _, _, excess = solve(unmapped, problem)
    # hybr has only a relative tolerance, which is 0 here.
    assert excess <= 1.0 or unmapped.key in UNABLE | {"scipy.hybr"}


def test_counts_equal_those_of_the_map(contender):
    problem = dataclasses.replace(PROBLEMS["tanh"], max_calls=300)
    counts = Counts()
    if contender.language == "jax":
        import jax

        executed = []
        formula = problem.formula

        def watched(xp, z, **constants):
            jax.debug.callback(lambda: executed.append(1))
            return formula(xp, z, **constants)

        run = contender.prepare(dataclasses.replace(problem, formula=watched), counts=counts)
        run()
        jax.effects_barrier()
        # Its first evaluation is for auxiliary data that nobody uses, so the compiler removes it.
        removed = contender.key.startswith("jaxopt.anderson")
        assert counts.evaluations == len(executed) - removed
    else:
        points = []

        def counted(z):
            # Only differences for a whole Jacobian are mapped: z itself, and a point for each entry of a sample.
            points.append(1 + z[0].numel() if torch._C._functorch.is_batchedtensor(z) else 1)
            return fn(z)

        fn = problem.fn
        problem = dataclasses.replace(problem, fn=counted)
        run = contender.prepare(problem, counts=counts)
        points.clear()
        run()
        assert counts.evaluations == sum(points)
        assert (max(points) > 1) == (contender.key == "pydeq.trust_region.best")
        if not contender.compiled:  # which calls the map only to compile it
            silent = contender.prepare(problem)
            points.clear()
            silent()
            assert counts.evaluations == sum(points)
    assert 0 < counts.evaluations <= problem.max_calls
    first = dataclasses.replace(counts)
    run()
    assert counts == Counts(2 * first.evaluations, 2 * first.products, first.batched)


def test_counts_the_product_that_starts_those_of_newton_krylov(contender):
    if contender.key != "pydeq.newton_krylov.default":
        return
    problem, counts = PROBLEMS["linear"], Counts()
    contender.prepare(problem, counts=counts)()
    solution = pydeq.fixed_point(problem.fn, problem.z0, solver=pydeq.NewtonKrylov(), rtol=problem.rtol)
    # On a linear map every step is accepted, so that each evaluation but the last has products.
    assert counts.evaluations == solution.nfe
    assert counts.products == solution.products + solution.nfe - 1


def test_solvers_of_equations_get_the_scale_and_sign_of_the_map():
    """A root of -7 r(z), stated as z + r(z) / 70, has the trials of a root of r(z), stated as z - r(z) / 10."""

    def stated(factor, step):
        def root(xp, z):
            return factor * (z**3 + z - 1.0)

        def formula(xp, z):
            return z - step * root(xp, z)

        z0 = torch.zeros(1, 3, dtype=torch.float64)
        return from_formula("cubic", "cubic", formula, z0, root=root, step=step, rtol=0.0, atol=1e-8, max_calls=400)

    problems = stated(1.0, 0.1), stated(-7.0, -0.1 / 7.0)
    for contender in FOUND:
        if contender.library in ("scipy", "xitorch") and contender.refusal(problems[0]) is None:
            counts = [Counts(), Counts()]
            values = [contender.prepare(p, 1.0, c)().value for p, c in zip(problems, counts, strict=True)]
            assert counts[0] == counts[1], contender.key
            torch.testing.assert_close(*values, equal_nan=True)


def test_an_overflow_passes_no_test():
    problem = dataclasses.replace(PROBLEMS["tanh"], z0=torch.zeros(2, 8))
    far = torch.full((2, 8), 1e30)
    assert not passes(far, far, problem, 1.0).any()


def test_a_compiled_map_has_a_twin_that_is_not_compiled():
    for contender in FOUND:
        twins = [each.key for each in FOUND if each.is_twin_of(contender)]
        assert len(twins) == 1, contender.key  # one that is not compiled is its own


def test_counts_a_jacobian_as_a_product_for_each_column(contender):
    solver = contender.key.removesuffix(".vmap")
    if solver not in ("optimistix.newton", "optimistix.chord"):
        return
    problem = PROBLEMS["tanh"]
    counts = Counts()
    contender.prepare(problem, counts=counts)()
    jacobians = counts.evaluations if solver == "optimistix.newton" else 1
    # A product with the whole batch counts once: mapped over samples, a Jacobian has the columns of one sample.
    columns = problem.z0.numel() // (len(problem.z0) if contender.mapped else 1)
    assert counts.products == jacobians * columns


def test_only_libraries_on_torch_solve_on_another_device(contender):
    refusal = contender.refusal(PROBLEMS["tanh"].to(torch.device("meta")))
    assert (refusal == "it is compared on the CPU only") == (contender.language != "torch")


def test_a_tighter_try_compiles_nothing(unmapped):
    if unmapped.language != "jax":
        return
    traced = []

    def formula(xp, z, x):
        traced.append(1)
        return 0.5 * xp.tanh(z) + x

    x = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
    fields = {"constants": {"x": x}, "sample_axes": {"x": 0}, "rtol": 1e-4}
    problem = from_formula("half", "half", formula, torch.zeros(2, 3), **fields)
    values, traces = [], []
    for tighten in (1.0, 0.01):
        solve = unmapped.prepare(problem, tighten)
        traced.clear()  # preparing a solve evaluates the map, too
        values.append(solve().value)
        traces.append(len(traced))
    assert traces[0] > 0
    assert traces[1] == 0
    # The tolerance is another one all the same.
    assert problem.excess(values[1]).max() <= 0.1
    # Another problem is compiled again.
    other = dataclasses.replace(problem, constants={"x": 2 * x})
    assert not torch.allclose(unmapped.prepare(other)().value, values[1])


def test_a_new_problem_resets_the_compiler_and_the_same_one_does_not(monkeypatch):
    resets, compiled = [], []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    compiler, (first, second) = Compiler(), PROBLEMS.values()
    z = torch.ones_like(first.z0)
    found = compiler.map(first)
    torch.testing.assert_close(found(z), first.fn(z))
    compiler.compile(first, lambda z: first.fn(z), z)
    assert compiler.map(first) is found
    assert (len(resets), len(compiled)) == (1, 2)
    other = compiler.map(second)
    torch.testing.assert_close(other(torch.ones_like(second.z0)), second.fn(torch.ones_like(second.z0)))
    assert compiler.map(first) is not found
    assert (len(resets), len(compiled)) == (3, 4)


def test_mapped_over_samples_each_sample_has_its_own_claim(contender):
    """The second sample has no fixed point, and the first one has one."""
    if not getattr(contender, "mapped", False):
        return

    def formula(xp, z, shift):
        return 0.5 * z + shift * (1.0 + xp.abs(z))

    constants = {"shift": torch.tensor([[0.1], [1.0]])}
    z0 = torch.ones(2, 3)
    problem = from_formula(
        "half", "half", formula, z0, constants=constants, sample_axes={"shift": 0}, max_calls=60, rtol=1e-4
    )
    claim = contender.prepare(problem)()
    assert claim.converged is not None
    assert not claim.converged[1]
    if contender.key != "jaxopt.anderson.vmap.best":  # whose norm of NaN is not below the tolerance either
        assert claim.converged[0]
        assert problem.excess(claim.value)[0] <= 1.0


def test_one_sample_or_coupled_samples_are_not_mapped(contender):
    if not getattr(contender, "mapped", False):
        return
    one = tanh_map(dim=8, rho=0.6, seed=7, batch=1)
    assert "one sample" in contender.refusal(one)
    assert "depend on each other" in contender.refusal(dataclasses.replace(PROBLEMS["tanh"], coupled=True))


def test_claims_nothing_without_a_fixed_point(unmapped):
    def formula(xp, z):
        return z + 0.5 * xp.sqrt(1.0 + z * z)

    problem = from_formula("none", "no fixed point", formula, torch.zeros(2, 3), solvable=False, max_calls=40)
    # Of newton_krylov, once nothing is finite, and of Anderson's small systems.
    with contextlib.suppress(ValueError, torch.linalg.LinAlgError):
        claim = unmapped.prepare(problem)()
        assert not (problem.excess(claim.value) <= 1.0).any()
        assert claim.converged is None or not claim.converged.any()


def test_leaves_the_precision_of_jax_alone(contender):
    if contender.language != "jax":
        return
    import jax

    contender.prepare(cubic())
    assert not jax.config.jax_enable_x64


def test_floor_evaluates_as_often_as_it_is_told():
    problem, counts = PROBLEMS["tanh"], Counts()
    claim = floor(7).prepare(problem, counts=counts)()
    z = problem.z0
    for _ in range(7):
        z = problem.fn(z)
    assert counts == Counts(evaluations=7)
    assert torch.equal(claim.value, z)
    assert claim.converged is None


def test_keys_are_unique_and_named_after_their_library():
    keys = [contender.key for contender in FOUND]
    assert len(set(keys)) == len(keys)
    assert all(contender.key.split(".")[0] == contender.library for contender in FOUND)


def test_a_library_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.scipy", raising=False)
    monkeypatch.delattr(benchmarks.peers, "scipy", raising=False)
    found, notices = contenders(["scipy", "loop"])
    assert {contender.library for contender in found} == {"loop"}
    (notice,) = notices
    assert notice.startswith("scipy is left out")
    assert "pip install scipy" in notice
    with pytest.raises(ValueError, match=r"names must be among .*, got nothing"):
        contenders(["nothing"])


@pytest.mark.parametrize(
    "problem",
    [PROBLEMS["linear"], PROBLEMS["tanh"], elementwise(4, 32), diagonal(4, 32)],
    ids=lambda problem: problem.key,
)
def test_a_formula_is_the_map(problem: Problem):
    z = torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(0))
    assert problem.formula is not None
    torch.testing.assert_close(problem.fn(z), problem.formula(torch, z, **problem.constants))
