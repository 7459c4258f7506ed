"""The sets of problems: published values, known roots, and the same formulas under torch and jax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.problems import more, roberts, scipy_tests
from benchmarks.problems.base import Problem
from benchmarks.problems.collection import FAMILIES, problems
from benchmarks.problems.systems import RESIDUAL, System

ROOT_FAMILIES = ("roberts", "more", "scipy")
ALL = problems()
# One problem of each formula: other sizes, starts and steps change nothing of it.
STATED = list({problem.root or problem.formula: problem for problem in reversed(ALL)}.values())
ROOTS = [problem for problem in ALL if problem.root is not None]


def residual(problem: Problem, z: torch.Tensor) -> torch.Tensor:
    assert problem.root is not None
    return problem.root(torch, z, **problem.constants)


def by_key(some: list[Problem]):
    return pytest.mark.parametrize("problem", some, ids=[problem.key for problem in some])


def test_keys_are_unique_and_begin_with_their_family():
    keys = [problem.key for problem in ALL]
    assert len(keys) == len(set(keys))
    for problem in ALL:
        assert problem.key.startswith(problem.family + ".")
        assert problem.family in FAMILIES
        assert problem.source


def test_a_family_or_the_beginning_of_a_key_selects():
    assert [p.key for p in problems(["roberts"])] == [p.key for p in ALL if p.family == "roberts"]
    assert len(problems(["roberts"])) == len(problems(["roberts.given"])) == 23
    chebyquad = problems(["more.chebyquad.n9", "more.wood"])
    assert {p.key for p in chebyquad} == {"more.wood", "more.wood.start10", "more.wood.start100", "more.chebyquad.n9"}
    with pytest.raises(ValueError, match=r"got \['mere'\]"):
        problems(["mere", "more.wood"])


# ||r(z0)|| in the output of MINPACK's tests of hybrd (ANL-80-74), by n and the factor of the start.
MINPACK = {
    "rosenbrock.n2": (0.4919350e01, 0.1340063e04, 0.1430001e06),
    "powell_singular": (0.1466288e02, 0.1270984e04, 0.1268879e06),
    "powell_badly_scaled": (0.1065487e01, 0.1000000e01),
    "wood": (0.8550557e04, 0.7349823e07, 0.7273070e10),
    "helical_valley": (0.5000000e02, 0.1029563e03, 0.9912618e03),
    "watson.n6": (0.6848587e02, 0.3531259e07),
    "watson.n9": (0.8878955e02, 0.1015108e08),
    "chebyquad.n5": (0.2257066e00, 0.4117243e07, 0.5636130e12),
    "chebyquad.n6": (0.2154720e00, 0.1307925e09, 0.1875579e15),
    "chebyquad.n7": (0.1837679e00, 0.4269328e10, 0.6414317e17),
    "chebyquad.n8": (0.1965139e00,),
    "chebyquad.n9": (0.1699499e00,),
    "brown.n10": (0.1653022e02, 0.9765624e07, 0.9765625e17),
    "brown.n30": (0.8347604e02,),
    "brown.n40": (0.1280264e03,),
    "boundary_value.n10": (0.2808058e-01, 0.5255526e00, 0.1065739e03),
    "integral_equation.n1": (0.1279297e00, 0.2562500e01, 0.8361172e03),
    "integral_equation.n10": (0.2518270e00, 0.6116833e01, 0.1269309e04),
    "trigonometric.n10": (0.8411753e-01, 0.2030519e02, 0.9336937e02),
    "variably_dimensioned.n10": (0.2240213e07, 0.5223438e08, 0.1592365e12),
    "broyden_tridiagonal.n10": (0.4582576e01, 0.6391009e03, 0.6333758e05),
    "broyden_banded.n10": (0.1897367e02, 0.1713092e05, 0.1594986e08),
}


def test_the_starts_of_more_have_minpacks_residuals():
    expected = {
        f"more.{name}" + ("" if factor == 1 else f".start{factor}"): value
        for name, values in MINPACK.items()
        for factor, value in zip((1, 10, 100), values, strict=False)
    }
    found = {problem.key: residual(problem, problem.z0).norm().item() for problem in problems(["more"])}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def systems() -> list[System]:
    of_more = [system for system, _ in more.systems()]
    return [*roberts.systems(), *of_more, *scipy_tests.nonlin_systems(), *scipy_tests.spectral_systems()]


def test_known_roots_are_roots():
    known = [system for system in systems() if system.solutions]
    assert len(known) >= 35
    for system in known:
        for solution in system.solutions:
            assert system.residual(solution[None]).norm() < 1e-12 * (1 + solution.norm()), system.name


def newton(system: System, steps: int = 200) -> torch.Tensor:
    """A root by Newton's method, halving steps that do not shrink r."""
    z = system.start
    for _ in range(steps):
        r = system.residual(z[None])[0]
        if r.norm() < 1e-12:
            break
        step = torch.linalg.lstsq(system.jacobian(z), r[:, None]).solution[:, 0]
        while not system.residual((z - step)[None]).norm() < r.norm() and step.norm() > 1e-14:
            step = step / 2
        z = z - step
    return z


def test_systems_without_a_known_root_have_one():
    unknown = [system for system in systems() if not system.solutions and system.solvable]
    assert {system.name.split(".")[0] for system in unknown} == {
        "watson", "boundary_value", "integral_equation", "broyden_tridiagonal", "broyden_banded",
        "chandrasekhar", "spectral",
    }  # fmt: skip
    for system in unknown:
        assert system.residual(newton(system)[None]).norm() < 1e-3 * RESIDUAL, system.name


def test_chebyquad_of_8_has_no_root():
    """The least ||r||^2 is published as 3.51687e-3: Moré, Garbow and Hillstrom, problem 35."""
    system = more.chebyquad(8)
    assert not system.solvable
    z = system.start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = system.residual(z[None]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(3.51687e-3, rel=1e-5)


def test_scipys_systems_are_scipys():
    pytest.importorskip("scipy")
    from scipy.optimize.tests import test__spectral, test_nonlin

    spectral = {
        "exponential_1.n100": "1", "exponential_2.n100": "2", "gasparo.n99": "4", "chandrasekhar.n100": "6",
        "augmented_powell_scipy.n99": "7", "singular.n100": "9", "logarithmic.n100": "10",
    }  # fmt: skip
    nonlin = {
        "cubic": "F", "identity": "F2", "linear": "F3", "powell": "F4_powell", "pressure_network": "F5",
        "preconditioned": "F6",
    }  # fmt: skip
    for system in [*scipy_tests.nonlin_systems(), *scipy_tests.spectral_systems()]:
        _, kind, name = f".{system.name}".split(".", 2)
        n = system.start.numel()
        near = system.start + 0.1 * torch.linspace(-1, 1, n, dtype=torch.float64)
        if kind == "nonlin":
            theirs = getattr(test_nonlin, nonlin[name])
            start, value = theirs.xin, theirs(near.numpy())
        elif name in spectral:
            theirs = getattr(test__spectral, f"F_{spectral[name]}")
            start, value = getattr(test__spectral, f"x0_{spectral[name]}")(n), theirs(near.numpy(), n)
        else:
            continue
        np.testing.assert_allclose(system.start.numpy(), start, rtol=1e-15)
        np.testing.assert_allclose(system.residual(near[None])[0].numpy(), value, rtol=1e-9, atol=1e-12)


def test_scipys_fixed_points():
    values = {
        "double": [0, 0, 0],
        "square": [1, 4 / 3, 1, 0.8],
        "square_root": [1, 0.5625, 1, 1.5625],
        "lambert": [0.2835716452048919],
        "kinetics": [1.3],
    }
    for name, value in values.items():
        (problem,) = (
            problems([f"scipy.fixed_point.{name}"]) if name != "square" else problems(["scipy.fixed_point.square"])[:1]
        )
        assert problem.excess(torch.tensor(value, dtype=torch.float64)[:, None]).max() <= 1
        assert problem.excess(problem.z0).min() > 1


@by_key(ROOTS)
def test_the_map_is_a_step_along_the_root(problem: Problem):
    assert problem.step is not None
    z = problem.z0 + 0.01 * torch.linspace(-1, 1, problem.z0.numel(), dtype=torch.float64).view_as(problem.z0)
    r = residual(problem, z)
    torch.testing.assert_close(problem.fn(z), z - problem.step * r, rtol=1e-14, atol=0)
    assert problem.fn(z).shape == z.shape


@pytest.mark.parametrize("family", ROOT_FAMILIES)
def test_a_root_is_judged_by_its_residual(family: str):
    """An excess of 1 is ||r|| = RESIDUAL, whatever the step; the tolerance is above the rounding of fn."""
    for problem in problems([family, f"{family}.given"]):
        if problem.root is None:
            continue
        r = residual(problem, problem.z0).norm(dim=1)
        torch.testing.assert_close(problem.excess(problem.z0), r / RESIDUAL)
        assert (problem.excess(problem.z0) > 1).all()
        assert problem.rtol == 0
        assert problem.facts["step"] == problem.step
    for system in systems():
        for solution in system.solutions:
            for step in (1.0, *(p.facts["step"] for p in ROOTS if p.key == f"{family}.{system.name}")):
                assert abs(step) * RESIDUAL > 4 * torch.finfo(torch.float64).eps * solution.norm()


def test_the_step_has_norm_one_and_the_sign_of_the_trace():
    for problem in problems(["roberts"]):
        system = next(s for s in roberts.systems() if problem.key == f"roberts.{s.name}")
        jacobian = problem.facts["step"] * system.jacobian(system.start)
        assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(1)
        assert jacobian.trace() >= 0


def test_known_roots_solve_their_problems():
    for family, some in (("roberts", roberts.systems()), ("more", (s for s, _ in more.systems()))):
        found = {problem.key: problem for problem in problems([family])}
        for system in some:
            for solution in system.solutions:
                assert found[f"{family}.{system.name}"].excess(solution[None]).item() <= 1


def test_rounding_far_from_the_origin_is_not_a_root():
    """r is near (-1e-4, 0) there, and z - b r(z) == z."""
    (problem,) = (p for p in problems(["roberts.powell_badly"]))
    far = torch.tensor([[1e-24, 1e20]], dtype=torch.float64)
    assert torch.equal(problem.fn(far), far)
    assert problem.excess(far).item() > 50


@pytest.fixture(scope="module")
def jax64():
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        yield jax


def _arrays(problem: Problem, dtype: torch.dtype):
    constants = {name: array.to(dtype) for name, array in problem.constants.items()}
    generator = torch.Generator().manual_seed(0)
    z0 = problem.z0.to(dtype)
    z = z0 + 1e-3 * torch.rand(z0.shape, generator=generator, dtype=dtype) * (1 + z0.abs())
    tangent = torch.randn(z0.shape, generator=generator, dtype=dtype)
    return z, tangent, constants


@by_key(STATED)
def test_torch_and_jax_agree(problem: Problem, jax64):
    """Values under jit, tangents by jvp of both, and <w, J v> = <J^T w, v>."""
    jax, jnp = jax64, jax64.numpy
    z, tangent, constants = _arrays(problem, torch.float64)
    theirs = {name: jnp.asarray(array.numpy()) for name, array in constants.items()}
    for formula in (problem.formula, problem.root):
        if formula is None:
            continue
        value, product = torch.func.jvp(  # pyright: ignore[reportAssignmentType]
            lambda z, f=formula: f(torch, z, **constants), (z,), (tangent,)
        )
        other = jax.jit(
            lambda z, f=formula: jax.jvp(lambda z: f(jnp, z, **theirs), (z,), (jnp.asarray(tangent.numpy()),))
        )
        other_value, other_product = other(jnp.asarray(z.numpy()))
        for ours, other_one in ((value, other_value), (product, other_product)):
            scale = max(1.0, ours.abs().max().item())
            np.testing.assert_allclose(ours.numpy(), np.asarray(other_one), rtol=1e-8, atol=1e-12 * scale)
        _, pull = torch.func.vjp(  # pyright: ignore[reportAssignmentType]
            lambda z, f=formula: f(torch, z, **constants), z
        )
        (gradient,) = pull(value)
        assert (gradient * tangent).sum().item() == pytest.approx((value * product).sum().item(), rel=1e-8, abs=1e-10)


@by_key(STATED)
def test_formulas_keep_single_precision(problem: Problem, jax64):
    z, _, constants = _arrays(problem, torch.float32)
    theirs = {name: jax64.numpy.asarray(array.numpy()) for name, array in constants.items()}
    for formula in (problem.formula, problem.root):
        if formula is not None:
            assert formula(torch, z, **constants).dtype == torch.float32
            traced = jax64.eval_shape(lambda z, f=formula: f(jax64.numpy, z, **theirs), z.numpy())
            assert traced.dtype == np.float32


@by_key(ALL)
def test_fn_and_excess_agree_with_the_formula(problem: Problem):
    assert problem.excess(problem.z0).shape == problem.z0.shape[:1]
    image = problem.fn(problem.z0)
    assert image.shape == problem.z0.shape
    assert image.dtype == problem.z0.dtype
    assert not math.isnan(image.double().sum().item())
