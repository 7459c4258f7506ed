"""Numbers from numpy are numbers, in every place that takes one, and nothing else is."""

import numpy as np
import pytest
import torch

import pydeq
from pydeq.testing import tanh_map

problem = tanh_map(0.8, 6)


@pytest.mark.parametrize("real", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("integer", [np.int8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("solver", [pydeq.Anderson, pydeq.Broyden, pydeq.GMRES, pydeq.Picard])
def test_a_solve_takes_numpy_scalars_for_what_they_are(solver, real, integer):
    name = {pydeq.GMRES: "restart", pydeq.Picard: None}.get(solver, "memory")
    depth = {} if name is None else {name: 4}
    plain = problem.solve(rtol=float(real(1e-3)), atol=0.0, max_steps=7, states_at=[2, 3], solver=solver(**depth))
    depth = {} if name is None else {name: integer(4)}
    given = problem.solve(
        rtol=real(1e-3),
        atol=real(0.0),
        max_steps=integer(7),
        states_at=[integer(2), integer(3)],
        solver=solver(**depth),
    )
    assert torch.equal(plain.image, given.image)
    assert plain.nfe == given.nfe
    assert all(torch.equal(a, b) for a, b in zip(plain.states, given.states, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda i, r: pydeq.Anderson(memory=i(3), damping=r(0.5), ridge=r(1e-6)),
        lambda i, r: pydeq.Broyden(memory=i(3)),
        lambda i, r: pydeq.GMRES(restart=i(3)),
        lambda i, r: pydeq.Picard(damping=r(0.5)),
        lambda i, r: pydeq.Implicit(rtol=r(0.5), max_steps=i(3)),
        lambda i, r: pydeq.Phantom(steps=i(3), damping=r(0.5)),
        lambda i, r: pydeq.Shine(refine_steps=i(3), rtol=r(0.5), limit=r(0.5)),
        lambda i, r: pydeq.Reversible(damping=r(0.5), checkpoints=i(3)),
        lambda i, r: pydeq.nn.VariationalDropout(r(0.5)),
        lambda i, r: pydeq.nn.spectral_norm(torch.nn.Linear(3, 3), n_power_iterations=i(2), dim=i(1)),
    ],
)
def test_settings_hold_pythons_own_numbers(make):
    given, plain = make(np.int64, np.float64), make(int, float)
    assert repr(given) == repr(plain)
    if not isinstance(given, torch.nn.Module):
        assert given == plain
        assert hash(given) == hash(plain)


def test_a_layer_takes_numpy_scalars():
    deq = pydeq.DEQ(
        lambda z, x: torch.tanh(0.5 * z + x),
        rtol=np.float32(1e-3),
        atol=np.float64(0),
        max_steps=np.int64(9),
        eval_max_steps=np.int32(4),
    )
    assert (type(deq.rtol), type(deq.max_steps), type(deq.eval_max_steps)) == (float, int, int)
    x = torch.randn(2, 3)
    solution = deq.eval()(torch.zeros(2, 3), x, return_solution=True, rtol=np.float32(0), max_steps=np.int16(3))[1]
    assert solution.nfe == 3


def test_eigenvalues_take_numpy_scalars():
    z = torch.randn(2, 3)
    radius = pydeq.spectral_radius(torch.tanh, z, steps=np.int64(20), rtol=np.float32(1e-3))
    assert torch.allclose(radius, (1 - torch.tanh(z).square()).amax(1), rtol=0.1)
    assert pydeq.jacobian_spectrum(torch.tanh, z, k=np.int64(2), steps=np.int32(3)).shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": np.bool_(True)}, "rtol must be a number, got bool"),
        ({"rtol": "1e-3"}, "rtol must be a number, got str"),
        ({"rtol": True}, "rtol must be a number, got bool"),
        ({"rtol": 1j}, "rtol must be a number, got complex"),
        ({"max_steps": np.float64(5)}, "max_steps must be an int, got float64"),
        ({"max_steps": np.bool_(True)}, "max_steps must be an int, got bool"),
        ({"max_steps": 5.0}, "max_steps must be an int, got float"),
        ({"states_at": [np.float32(2)]}, r"states_at\[0\] must be an int, got float32"),
    ],
)
def test_what_is_no_number_is_refused_by_its_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        problem.solve(**arguments)


@pytest.mark.parametrize("value", [np.float32("nan"), np.float64(-1), float("nan")])
def test_tolerances_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"rtol must be at least 0, got (nan|-1\.0)"):
        problem.solve(rtol=value)
