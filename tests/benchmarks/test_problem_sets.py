"""The sets of problems: published values, known roots, and the same formulas under torch and jax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.problems import burkardt, more, scipy_tests, sizes
from benchmarks.problems.base import Problem
from benchmarks.problems.collection import FAMILIES, problems
from benchmarks.problems.systems import RESIDUAL, System

ROOT_FAMILIES = ("burkardt", "more", "scipy")
ALL = [problem for name in FAMILIES if name != "sizes" for problem in problems([name])]
ALL += [problem for problem in problems(["sizes"]) if problem.z0.numel() <= 1e5]
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
    assert [p.key for p in problems(["burkardt"])] == [p.key for p in ALL if p.family == "burkardt"]
    assert len(problems(["burkardt"])) == len(problems(["burkardt.given"])) == 23
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
    return [*burkardt.systems(), *of_more, *scipy_tests.nonlin_systems(), *scipy_tests.spectral_systems()]


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
        (problem,) = (problem for problem in ALL if problem.key == f"scipy.fixed_point.{name}")
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
    for problem in problems(["burkardt"]):
        system = next(s for s in burkardt.systems() if problem.key == f"burkardt.{s.name}")
        jacobian = problem.facts["step"] * system.jacobian(system.start)
        assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(1)
        assert jacobian.trace() >= 0


def test_known_roots_solve_their_problems():
    of_scipy = [*scipy_tests.nonlin_systems(), *scipy_tests.spectral_systems()]
    sets = {"burkardt": burkardt.systems(), "more": [system for system, _ in more.systems()], "scipy": of_scipy}
    found = {problem.key: problem for problem in ROOTS}
    for family, some in sets.items():
        for system in some:
            for solution in system.solutions:
                for key in (f"{family}.{system.name}", f"{family}.given.{system.name}"):
                    assert found[key].excess(solution[None]).item() <= 1, key


def test_rounding_far_from_the_origin_is_not_a_root():
    """r is near (-1e-4, 0) there, and z - b r(z) == z."""
    (problem,) = (p for p in problems(["burkardt.powell_badly"]))
    far = torch.tensor([[1e-24, 1e20]], dtype=torch.float64)
    assert torch.equal(problem.fn(far), far)
    assert problem.excess(far).item() > 50


@pytest.fixture(scope="module")
def jax64(jax):
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
def test_fn_and_excess_keep_their_shapes(problem: Problem):
    assert problem.excess(problem.z0).shape == problem.z0.shape[:1]
    image = problem.fn(problem.z0)
    assert image.shape == problem.z0.shape
    assert image.dtype == problem.z0.dtype
    assert not math.isnan(image.double().sum().item())


SPECTRA = problems(["spectra"])


@by_key(SPECTRA)
def test_the_spectrum_is_as_prescribed(problem: Problem):
    matrix = problem.constants["transposed"].double()
    eigenvalues = torch.linalg.eigvals(matrix)
    # Rounding moves a multiple eigenvalue by up to eps^(1/size), and simple ones by their condition number.
    tolerance = {"jordan.0.9.size2": 1e-6, "jordan.0.9.size4": 1e-2, "jordan.0.5.size8": 0.1, "nonnormal.norm10": 0.05}
    allowed = tolerance.get(problem.key.removeprefix("spectra."), 1e-6)
    assert eigenvalues.abs().max().item() == pytest.approx(problem.facts["spectral_radius"], rel=allowed)
    norm = torch.linalg.matrix_norm(matrix, 2).max().item()
    assert norm == pytest.approx(problem.facts["spectral_norm"], rel=1e-6)


@by_key(SPECTRA)
def test_linear_maps_have_their_fixed_points(problem: Problem):
    matrix, x = problem.constants["transposed"].double(), problem.constants["x"].double()
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    if matrix.ndim == 3:
        value = torch.linalg.solve((identity - matrix).mT, x[:, :, None])[:, :, 0]
    else:
        value = torch.linalg.solve((identity - matrix).T, x.T).T
    assert problem.excess(value).max() <= 1
    # Also when it is rounded to the problem's own precision.
    assert problem.excess(value.to(problem.z0.dtype)).max() <= 1
    assert problem.excess(problem.z0).min() > 1


def spectrum(key: str) -> torch.Tensor:
    (problem,) = (problem for problem in SPECTRA if problem.key == key)
    return torch.linalg.eigvals(problem.constants["transposed"].double())


def test_spectra_lie_where_their_names_say():
    real = spectrum("spectra.symmetric.-0.99_0.99").real.sort().values
    torch.testing.assert_close(real, torch.linspace(-0.99, 0.99, 64, dtype=torch.float64), rtol=0, atol=1e-6)
    turns = spectrum("spectra.rotations.0.99")
    torch.testing.assert_close(turns.abs(), torch.full((64,), 0.99).double(), rtol=0, atol=1e-6)
    assert turns.imag.abs().min() > 0.04
    rates = 1 - spectrum("spectra.stiff").real
    assert (rates.max() / rates.min()).item() == pytest.approx(1e6, rel=1e-6)
    assert (spectrum("spectra.expanding.5").real < 1e-6).all()
    indefinite = spectrum("spectra.indefinite.5").real
    assert (indefinite > 1.09).sum() == (indefinite < 1e-6).sum() == 32
    radii = spectrum("spectra.mixed.60_4.0.99").abs().amax(dim=1)
    assert (radii > 0.98).nonzero().flatten().tolist() == [15, 31, 47, 63]
    assert (radii < 0.51).sum() == 60
    assert problems(["spectra.nonnormal"])[0].facts["spectral_norm"] == pytest.approx(10)
    x = problems(["spectra.badly_scaled"])[0].constants["x"].abs().median(dim=0).values
    assert x.max() / x.min() > 1e11


RUNAWAY = problems(["runaway"])


@by_key(RUNAWAY)
def test_runaways_keep_their_distance_on_a_grid(problem: Problem):
    n = problem.z0.shape[1]
    far = torch.logspace(1, 6, 1000, dtype=torch.float64)
    line = torch.cat([torch.linspace(-20, 20, 200_001, dtype=torch.float64), far, -far])
    entries = torch.stack([line.roll(7919 * i) for i in range(n)], dim=1)
    distance = residual(problem, torch.cat([entries, line[:, None].expand(-1, n)])).norm(dim=1)
    assert (distance >= problem.facts["gap"] * (1 - 1e-12)).all()
    assert problem.facts["gap"] > 1e3 * problem.atol
    assert not problem.solvable


@given(data=st.data())
def test_runaways_keep_their_distance_anywhere(data: st.DataObject):
    problem = data.draw(st.sampled_from(RUNAWAY))
    entry = st.floats(-1e12, 1e12) | st.floats(-10, 10)
    n = problem.z0.shape[1]
    z = torch.tensor([data.draw(st.lists(entry, min_size=n, max_size=n))], dtype=torch.float64)
    assert residual(problem, z).norm() >= problem.facts["gap"] * (1 - 1e-12)
    assert not (problem.excess(z.expand_as(problem.z0)) <= 1).any()


@by_key(problems(["false_friends"]))
def test_false_friends_have_no_fixed_point_but_meet_the_tolerance_far_out(problem: Problem):
    line = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    assert (residual(problem, line[:, None].expand(-1, problem.z0.shape[1])) < 0).all()
    assert not problem.solvable
    assert problem.excess(problem.z0 + 1e6).max() <= 1


def test_judging_runaways_ignores_rounding():
    """z + 1 == z in float64."""
    (problem,) = problems(["runaway.shift"])
    far = torch.full_like(problem.z0, 1e17)
    assert torch.equal(problem.fn(far), far)
    assert problem.excess(far).min() > 1


def test_maps_without_a_fixed_point_are_what_their_titles_say():
    z = torch.linspace(-3, 3, 24, dtype=torch.float64).view(3, 8)
    maps = {
        "runaway.shift": lambda z: z + 1,
        "runaway.exponential": torch.exp,
        "runaway.waves": lambda z: z + 2 + z.sin(),
        "runaway.near_miss": lambda z: z + z**2 + 0.01,
        "runaway.jump": lambda z: torch.where(z > 0, -1.0, 1.0).double(),
        "false_friends.slowing": lambda z: z + 1 / (1 + z**2),
        "false_friends.hyperbola": lambda z: (z**2 + 1).sqrt(),
        "false_friends.softplus": torch.nn.functional.softplus,
    }
    for key, fn in maps.items():
        (problem,) = problems([key])
        torch.testing.assert_close(problem.fn(z), fn(z), rtol=1e-8, atol=1e-8)
    (flip,), (screw,) = problems(["runaway.flip"]), problems(["runaway.screw"])
    torch.testing.assert_close(flip.fn(z[:, :2]), torch.stack([-z[:, 0], z[:, 1] + 1], dim=1))
    one = torch.ones(3, dtype=torch.float64)
    turned = torch.polar(one, one) * torch.complex(z[:, 0], z[:, 1])
    torch.testing.assert_close(screw.fn(z[:, :3]), torch.stack([turned.real, turned.imag, z[:, 2] + 1], dim=1))


@by_key(problems(["cycles"]))
def test_cycles_hide_a_fixed_point(problem: Problem):
    """Newton's method finds it from nearby; plain iteration never meets the tolerance."""
    z = problem.z0
    for _ in range(1000):
        z = problem.fn(z)
        assert problem.excess(z).min() > 1
    value = problem.z0
    if problem.key == "cycles.steep":
        value = 0.1 * value
    elif problem.key == "cycles.logistic":
        value = 0.1 + 0.9 * (1 - 1 / problem.constants["rate"]).expand_as(value)
    identity = torch.eye(value.shape[1], dtype=torch.float64)
    for _ in range(50):
        slopes = torch.autograd.functional.jacobian(lambda z: problem.fn(z).sum(dim=0), value)
        assert isinstance(slopes, torch.Tensor)  # [n, B, n]
        correction = torch.linalg.solve(identity - slopes.transpose(0, 1), (problem.fn(value) - value)[:, :, None])
        value = value + correction[:, :, 0]
    assert problem.excess(value).max() <= 1


def test_cycles_return():
    for key, period in (("cycles.negation", 2), ("cycles.quarter_turns", 4), ("cycles.negated_ring", 14)):
        (problem,) = problems([key])
        z = problem.z0
        for _ in range(period):
            z = problem.fn(z)
        torch.testing.assert_close(z, problem.z0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", list(sizes.NAMES), ids=str)
def test_maps_of_any_size_contract(dtype: torch.dtype):
    for problem in (
        sizes.tanh_diagonal(3, 10, dtype),
        sizes.diagonal(3, 10, dtype),
        sizes.causal_convolution(3, 16, 4, dtype=dtype),
        sizes.causal_attention(3, 16, 4, dtype=dtype),
    ):
        assert problem.z0.dtype == dtype
        first = torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        second = problem.fn(first)
        assert second.dtype == dtype
        moved = (problem.fn(second) - second).double().abs().amax(dim=1)
        limit = (second - first).double().abs().amax(dim=1)
        assert (moved <= 0.9 * limit + 4 * torch.finfo(dtype).eps).all()


def test_sequences_are_causal():
    for make in (sizes.causal_convolution, sizes.causal_attention):
        problem = make(2, 16, 4, dtype=torch.float64)
        z = torch.linspace(-1, 1, problem.z0.numel(), dtype=torch.float64).view_as(problem.z0)
        changed = z.clone().view(2, 16, 4)
        changed[:, 9] += 1
        difference = (problem.fn(changed.view_as(z)) - problem.fn(z)).view(2, 16, 4).abs().amax(dim=(0, 2))
        assert (difference[:9] == 0).all()
        assert difference[9] > 0


def test_sizes_reach_ten_million_and_a_batch_of_4096():
    shapes = [tuple(problem.z0.shape) for problem in problems(["sizes"])]
    assert (1, 10_000_000) in shapes
    assert (4096, 1_000) in shapes


SEVERAL = [problem for problem in ALL if problem.formula is not None and len(problem.z0) > 1 and not problem.coupled]


@by_key(list({problem.formula: problem for problem in SEVERAL}.values()))
def test_a_sample_with_its_share_of_the_constants_is_the_same_as_in_the_batch(problem: Problem):
    assert problem.formula is not None
    # The same numbers for all samples would not tell whose share a constant is.
    noise = torch.rand(problem.z0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = problem.z0.double() + 1.0 + noise
    constants = {name: value.double() for name, value in problem.constants.items()}
    whole = problem.formula(torch, z, **constants)
    for sample in (0, len(z) - 1):
        share = {
            name: value.narrow(problem.sample_axes[name], sample, 1) if name in problem.sample_axes else value
            for name, value in constants.items()
        }
        alone = problem.formula(torch, z[sample : sample + 1], **share)
        assert alone.shape == whole[sample : sample + 1].shape
        torch.testing.assert_close(alone[0], whole[sample], equal_nan=True)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sizes"])
def test_a_problem_moves_to_a_device_with_all_that_its_map_needs(name):
    """An operation on a tensor that stayed behind raises."""
    for problem in (each for each in ALL if each.family == name):
        moved = problem.to(torch.device("meta"))
        image = moved.fn(moved.z0)
        assert image.device.type == "meta"
        assert image.shape == moved.z0.shape
        assert {each.device.type for each in moved.constants.values()} <= {"meta"}
        assert problem.to(problem.z0.device) is problem
        if moved.root is not None:
            assert moved.root(torch, moved.z0, **moved.constants).device.type == "meta"
