import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import pydeq

# What a tolerance of 1e-12 on contractive maps leaves of a derivative, with room for its condition.
TIGHT = {"rtol": 1e-12, "max_steps": 200}
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def cell_fn(z, weight, x):
    return torch.tanh(z @ weight.T + x)


class Cell(nn.Module):
    def __init__(self, dim=4, seed=0):
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(dim, dim, generator=generator(seed), dtype=torch.float64))
        self.register_buffer("shift", torch.randn(dim, generator=generator(seed + 1), dtype=torch.float64))

    def forward(self, z, x):
        return cell_fn(z, self.weight, x + self.shift)


class TupleCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2, dtype=torch.float64)
        self.b = nn.Linear(2, 3, dtype=torch.float64)
        for p in self.parameters():
            p.data.normal_(std=0.3, generator=generator(5))

    def forward(self, z, x):
        return torch.tanh(self.a(z[1]) + x[0]), torch.tanh(self.b(z[0]) + x["second"])


def layer(cell, solver=None, **options):
    adjoint = pydeq.Implicit(solver=pydeq.Broyden(), **TIGHT)
    return pydeq.DEQ(cell, solver=solver or pydeq.Broyden(), adjoint=adjoint, **(TIGHT | options))


def unrolled(weight, x, steps=300):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = cell_fn(z, weight, x)
    return z


@pytest.fixture
def problem():
    weight = 0.2 * torch.randn(4, 4, generator=generator(0), dtype=torch.float64)
    x = torch.randn(3, 4, generator=generator(1), dtype=torch.float64)
    deq = layer(cell_fn)
    return weight, x, lambda weight, x: deq(torch.zeros_like(x), weight, x)


def square(f):
    return lambda *args: (f(*args) ** 2).sum()


FIRST = {"grad": grad, "jacrev": jacrev, "jacfwd": jacfwd}
SECOND = {f"{a.__name__}({b.__name__})": (a, b) for a, b in itertools.product((jacrev, jacfwd), repeat=2)}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize("solver", [pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden()], ids=lambda s: type(s).__name__)
def test_first_derivatives_are_those_of_an_unrolled_solve(problem, name, argnum, solver):
    weight, x, _ = problem
    deq = layer(cell_fn, solver)
    transform = FIRST[name]
    wrap = square if name == "grad" else (lambda f: f)
    got = transform(wrap(lambda w, x: deq(torch.zeros_like(x), w, x)), argnums=argnum)(weight, x)
    torch.testing.assert_close(got, transform(wrap(unrolled), argnums=argnum)(weight, x), **CLOSE)


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("argnum", [0, 1])
def test_second_derivatives_in_any_mix_of_modes(problem, name, argnum):
    weight, x, solve = problem
    outer, inner = SECOND[name]
    got = outer(inner(square(solve), argnums=0), argnums=argnum)(weight, x)
    expected = outer(inner(square(unrolled), argnums=0), argnums=argnum)(weight, x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


def test_third_derivatives(problem):
    weight, x, solve = problem
    direction = torch.randn(4, 4, generator=generator(3), dtype=torch.float64)

    def along(f):
        return lambda t: square(f)(weight + t * direction, x)

    t = torch.zeros((), dtype=torch.float64)
    got = grad(grad(grad(along(solve))))(t)
    expected = grad(grad(grad(along(unrolled))))(t)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


def test_hessian_vector_product(problem):
    weight, x, solve = problem
    v = torch.randn(4, 4, generator=generator(3), dtype=torch.float64)

    def product(f):
        return jvp(grad(lambda w: square(f)(w, x)), (weight,), (v,))[1]

    torch.testing.assert_close(product(solve), product(unrolled), **CLOSE)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
def test_vmap_folds_into_the_batch(problem, in_dims):
    weight, x, solve = problem
    scales = torch.tensor([0.5, 1.0, 1.5, 0.1, 0.9], dtype=torch.float64)
    weights, xs = (
        t if dim is None else torch.stack([s * t for s in scales], dim)
        for t, dim in zip((weight, x), in_dims, strict=True)
    )
    got = vmap(solve, in_dims)(weights, xs)
    torch.testing.assert_close(got, vmap(unrolled, in_dims)(weights, xs), **CLOSE)
    got = vmap(grad(square(solve), argnums=(0, 1)), in_dims)(weights, xs)
    expected = vmap(grad(square(unrolled), argnums=(0, 1)), in_dims)(weights, xs)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_vmap_of_vmap(problem):
    weight, x, solve = problem
    weights = torch.stack([weight, 0.5 * weight])
    xs = torch.stack([x, 2.0 * x, -x])
    got = vmap(vmap(solve, (None, 0)), (0, None))(weights, xs)
    expected = torch.stack([torch.stack([unrolled(w, x) for x in xs]) for w in weights])
    torch.testing.assert_close(got, expected, **CLOSE)


def test_vmap_with_an_eager_backward(problem):
    weight, x, solve = problem
    weights = torch.stack([weight, 0.5 * weight]).requires_grad_()
    vmap(solve, (0, None))(weights, x).square().sum().backward()
    expected = vmap(grad(square(unrolled)), (0, None))(weights.detach(), x)
    torch.testing.assert_close(weights.grad, expected, **CLOSE)


def test_a_mapped_initial_state(problem):
    weight, x, _ = problem
    deq = layer(cell_fn)
    z0 = torch.randn(2, 3, 4, generator=generator(9), dtype=torch.float64)
    got = vmap(lambda z0: deq(z0, weight, x))(z0)
    torch.testing.assert_close(got, unrolled(weight, x).expand(2, 3, 4), **CLOSE)


def test_parameters_and_buffers_through_functional_call():
    x = torch.randn(3, 4, generator=generator(1), dtype=torch.float64)
    deq = layer(Cell())
    state = dict(deq.named_parameters()) | dict(deq.named_buffers())
    state = {name: value.detach() for name, value in state.items()}

    def loss(state):
        return functional_call(deq, state, (torch.zeros_like(x), x)).square().sum()

    got = grad(loss)(state)
    expected = grad(lambda w, b: unrolled(w, x + b).square().sum(), argnums=(0, 1))(*state.values())
    torch.testing.assert_close(tuple(got.values()), expected, **CLOSE)

    ensemble = {name: torch.stack([value, 0.5 * value]) for name, value in state.items()}
    got = vmap(grad(loss))(ensemble)
    for i in range(2):
        expected = grad(loss)({name: value[i] for name, value in ensemble.items()})
        for name, value in expected.items():
            torch.testing.assert_close(got[name][i], value, **CLOSE)


def test_per_sample_gradients():
    x = torch.randn(3, 4, generator=generator(1), dtype=torch.float64)
    deq = layer(Cell())
    state = {name: value.detach() for name, value in deq.state_dict().items()}

    def loss(state, x):
        return functional_call(deq, state, (torch.zeros_like(x[None]), x[None])).square().sum()

    got = vmap(grad(loss), (None, 0))(state, x)["cell.weight"]
    for i in range(3):
        torch.testing.assert_close(got[i], grad(loss)(state, x[i])["cell.weight"], **CLOSE)


def test_tuple_state_nested_context_and_constants():
    deq = layer(TupleCell())
    zeros = (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    state = {name: value.detach() for name, value in deq.named_parameters()}
    x = (torch.ones(2, 2, dtype=torch.float64), "constant")
    second = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)

    def solve(state, second):
        z = functional_call(deq, state, (zeros, {0: x[0], "second": second}))
        return z[0].sum() + z[1].square().sum()

    def reference(state, second):
        z = zeros
        for _ in range(200):
            z = functional_call(deq.cell, {k[5:]: v for k, v in state.items()}, (z, {0: x[0], "second": second}))
        return z[0].sum() + z[1].square().sum()

    for outer in (grad, jacfwd):
        got, expected = (outer(f, argnums=(0, 1))(state, second) for f in (solve, reference))
        torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(hessian(solve, 1)(state, second), hessian(reference, 1)(state, second), **CLOSE)


def test_forward_mode_without_transforms(problem):
    weight, x, solve = problem
    tangent = torch.randn(3, 4, generator=generator(7), dtype=torch.float64)
    with forward_ad.dual_level():
        value, got = forward_ad.unpack_dual(solve(weight, forward_ad.make_dual(x, tangent)))
    expected, along = jvp(lambda x: unrolled(weight, x), (x,), (tangent,))
    torch.testing.assert_close((value, got), (expected, along), **CLOSE)


def test_integer_inputs_pass_through():
    table = torch.randn(5, 4, generator=generator(0), dtype=torch.float64)
    deq = layer(lambda z, table, ids: 0.5 * torch.tanh(z + table[ids]))
    ids = torch.tensor([0, 3, 3])
    zeros = torch.zeros(3, 4, dtype=torch.float64)

    def reference(table):
        z = zeros
        for _ in range(200):
            z = 0.5 * torch.tanh(z + table[ids])
        return z.sum()

    got = grad(lambda table: deq(zeros, table, ids).sum())(table)
    torch.testing.assert_close(got, grad(reference)(table), **CLOSE)
    got = jacfwd(lambda table: deq(zeros, table, ids).sum())(table)
    torch.testing.assert_close(got, grad(reference)(table), **CLOSE)


def capturing(deq_of):
    """x -> the layer whose cell captures 2 x."""

    def solve(x: Tensor) -> Tensor:
        scale = 0.1 * x
        return deq_of(lambda z, y: torch.tanh(scale * z + y))(torch.zeros(3, 4, dtype=torch.float64), x).sum()

    return solve


@pytest.mark.parametrize("adjoint", [pydeq.Implicit(), pydeq.Phantom(2)], ids=["Implicit", "Phantom"])
@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: grad(f)(x),
        lambda f, x: jvp(f, (x,), (x,)),
        lambda f, x: vmap(f)(torch.stack([x, x])),
        lambda f, x: vmap(grad(f))(torch.stack([x, x])),
        lambda f, x: jacfwd(f)(x),
        lambda f, x: hessian(f)(x),
    ],
    ids=["grad", "jvp", "vmap", "vmap of grad", "jacfwd", "hessian"],
)
def test_a_captured_tensor_raises_instead_of_giving_zero(transformed, adjoint):
    solve = capturing(lambda cell: pydeq.DEQ(cell, adjoint=adjoint))
    x = torch.randn(3, 4, generator=generator(2), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="captures a tensor"):
        transformed(solve, x)


def test_a_captured_leaf_raises_under_vmap():
    weight = torch.eye(4, requires_grad=True)
    deq = pydeq.DEQ(lambda z, x: 0.1 * z @ weight + x)
    with pytest.raises(RuntimeError, match="captures a tensor"):
        vmap(lambda x: deq(torch.zeros_like(x), x))(torch.ones(2, 3, 4))


def test_a_bound_method_has_its_modules_parameters():
    cell = Cell()
    deq = layer(cell.forward)
    x = torch.randn(2, 3, 4, generator=generator(1), dtype=torch.float64)
    vmap(lambda x: deq(torch.zeros_like(x), x))(x).sum().backward()
    got, cell.weight.grad = cell.weight.grad, None
    deq(torch.zeros(6, 4, dtype=torch.float64), x.flatten(0, 1)).sum().backward()
    torch.testing.assert_close(got, cell.weight.grad, **CLOSE)


def test_fixed_point_itself_raises_under_transforms():
    for transform in (grad, vmap):
        with pytest.raises(RuntimeError, match=r"use pydeq\.DEQ"):
            transform(lambda x: pydeq.fixed_point(lambda z: z + x, x).image.sum())(torch.ones(2, 3))


def test_phantom_unrolls_under_transforms(problem):
    weight, x, _ = problem
    deq = pydeq.DEQ(cell_fn, adjoint=pydeq.Phantom(3), **TIGHT)
    star = unrolled(weight, x)

    def reference(weight, x):
        z = star
        for _ in range(3):
            z = cell_fn(z, weight, x)
        return z

    def solve(weight, x):
        return deq(torch.zeros_like(x), weight, x)

    torch.testing.assert_close(grad(square(solve))(weight, x), grad(square(reference))(weight, x), **CLOSE)
    torch.testing.assert_close(jacfwd(solve)(weight, x), jacfwd(reference)(weight, x), **CLOSE)
    deq.adjoint = pydeq.Phantom(3, form="neumann")
    with pytest.raises(RuntimeError, match='form="unroll"'):
        grad(square(solve))(weight, x)


def test_the_solution_comes_out_of_a_transform(problem):
    weight, x, _ = problem
    deq = layer(cell_fn)

    solutions = []

    def loss(weight):
        z, solution = deq(torch.zeros_like(x), weight, x, return_solution=True)
        solutions.append(solution)
        return z.sum(), solution.residual

    _, residual = grad(loss, has_aux=True)(weight)
    (solution,) = solutions
    assert (residual < 1e-10).all()
    assert solution.converged.all()
    assert solution.backward.converged.all()
    assert solution.nfe > 1


def test_evaluations_run_in_the_autocast_state_of_the_forward():
    dtypes = set()

    def cell(z, weight, x):
        product = z @ weight
        dtypes.add(product.dtype)
        return torch.tanh(product + x)

    deq = pydeq.DEQ(cell, rtol=1e-2)
    weight, x = 0.2 * torch.eye(4), torch.ones(3, 4)

    def solve(weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return deq(torch.zeros(3, 4), weight, x)

    value, backward = torch.func.vjp(solve, weight)
    (gradient,) = backward(torch.ones_like(value))
    assert dtypes == {torch.bfloat16}
    assert gradient.dtype == torch.float32
    expected = grad(lambda w: unrolled(w.T, x).sum())(weight)
    torch.testing.assert_close(gradient, expected, rtol=0.05, atol=0.05)


def test_shared_modules_and_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, dtype=torch.float64)
            self.again = self.first
            self.other = nn.Linear(4, 4, bias=False, dtype=torch.float64)
            self.other.weight = self.first.weight

        def forward(self, z, x):
            return torch.tanh(0.2 * (self.first(z) + self.again(x) + self.other(z)))

    deq = layer(Tied())
    x = torch.randn(3, 4, generator=generator(1), dtype=torch.float64)
    gradients = []
    for solve in (deq, lambda z, x: vmap(deq)(z[None], x[None])):
        solve(torch.zeros_like(x), x).square().sum().backward()
        gradients.append({name: p.grad for name, p in deq.named_parameters()})
        deq.zero_grad()
    eager, mapped = gradients
    assert list(mapped) == ["cell.first.weight", "cell.first.bias"]
    torch.testing.assert_close(mapped, eager, **CLOSE)


@pytest.mark.parametrize(
    "adjoint", [pydeq.Shine(), pydeq.Unrolled(), pydeq.Reversible()], ids=lambda a: type(a).__name__
)
def test_other_adjoints_say_that_they_do_not_work(adjoint):
    name = type(adjoint).__name__
    solver = pydeq.Broyden() if isinstance(adjoint, pydeq.Shine) else None
    deq = pydeq.DEQ(lambda z, x: 0.5 * z + x, solver=solver, adjoint=adjoint)
    with pytest.raises(RuntimeError, match=rf"{name} does not work under torch\.func.*use pydeq\.Implicit"):
        grad(lambda x: deq(torch.zeros_like(x), x).sum())(torch.ones(2, 3))


def test_states_along_the_way_are_refused(problem):
    _, x, _ = problem
    deq = layer(lambda z, x: 0.5 * z + x, states_at=[2])
    with pytest.raises(RuntimeError, match="states_at"):
        vmap(lambda x: deq(torch.zeros_like(x), x))(x[None])


def tangents(solve, *duals):
    """What forward-mode AD by dual numbers gives, outside of torch.func."""
    with forward_ad.dual_level():
        value = solve(*(forward_ad.make_dual(x, tangent) for x, tangent in duals))
        return forward_ad.unpack_dual(value).tangent


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.linear.weight.data.normal_(std=0.2, generator=generator(3))

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def phantom(fn, x, steps=2):
    """The state that is iterated a few times from the solution, without following how the solution moves."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        z = torch.zeros_like(x)
        for _ in range(300):
            z = fn(z, x)
    for _ in range(steps):
        z = fn(z, x)
    return z


@pytest.mark.parametrize("moving", [False, True], ids=["weight", "weight and context"])
@pytest.mark.parametrize("adjoint", [pydeq.Implicit(**TIGHT), pydeq.Phantom(2)], ids=["Implicit", "Phantom"])
@pytest.mark.parametrize("how", ["attribute", "_parameters", "functional_call"])
def test_parameters_exchanged_for_dual_numbers(adjoint, moving, how):
    """As the tutorial of forward-mode AD does it."""
    weight, x = (0.2 * torch.randn(4, 4, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    along = [torch.randn(4, 4, generator=generator(i), dtype=torch.float64) for i in (5, 6)]

    def exchanged(make):
        cell = Affine()

        def solve(weight, x):
            model = make(cell)
            if how == "functional_call":
                return functional_call(model, {f"{prefix(model)}linear.weight": weight}, (torch.zeros_like(x), x))
            if how == "attribute":
                del cell.linear.weight
                cell.linear.weight = weight
            else:
                cell.linear._parameters["weight"] = weight
            return model(torch.zeros_like(x), x)

        return solve

    def prefix(model):
        return "cell."

    def reference(weight, x):
        cell = Affine()

        def fn(z, x):
            return torch.tanh(z @ weight.T + cell.linear.bias + x)

        if isinstance(adjoint, pydeq.Phantom):
            return phantom(fn, x)
        z = torch.zeros_like(x)
        for _ in range(100):
            z = fn(z, x)
        return z

    duals = [(weight, along[0]), (x, along[1] if moving else torch.zeros_like(x))]
    torch.manual_seed(0)
    got = tangents(exchanged(lambda cell: pydeq.DEQ(cell, adjoint=adjoint, **TIGHT)), *duals)
    torch.manual_seed(0)
    expected = tangents(reference, *duals)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("moving", [False, True], ids=["captured", "captured and context"])
def test_a_captured_dual_number_raises_or_counts(moving):
    weight, x = (0.2 * torch.randn(4, 4, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    along = [torch.randn(4, 4, generator=generator(i), dtype=torch.float64) for i in (5, 6)]

    def solve(adjoint):
        def through(weight, x):
            deq = pydeq.DEQ(lambda z, x: cell_fn(z, weight, x), adjoint=adjoint, **TIGHT)
            return deq(torch.zeros_like(x), x if moving else forward_ad.unpack_dual(x).primal)

        return through

    duals = list(zip((weight, x), along, strict=True))
    with pytest.raises(RuntimeError, match="forward-mode AD, the cell captures a tensor"):
        tangents(solve(pydeq.Implicit()), *duals)
    got = tangents(solve(pydeq.Phantom(2)), *duals)
    expected = tangents(
        lambda w, x: phantom(lambda z, x: cell_fn(z, w, x), x if moving else forward_ad.unpack_dual(x).primal), *duals
    )
    torch.testing.assert_close(got, expected, **CLOSE)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.linear.weight.data.normal_(std=0.2, generator=generator(3))
        self.norm.weight.data.fill_(0.3)
        self.norm.running_mean.normal_(generator=generator(4))

    def forward(self, z, x):
        return torch.tanh(self.norm(self.linear(z)) + x)


def tensors_of(module):
    return (
        {name: p.detach().clone() for name, p in module.named_parameters()},
        {name: b.clone() for name, b in module.named_buffers()},
    )


@pytest.mark.filterwarnings("ignore::pydeq.CouplingWarning")  # of batch statistics, said once
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd], ids=lambda t: t.__name__)
def test_batch_norm_under_transforms(transform, training):
    """Buffers that nobody differentiates are not to be differentiated; in training, passed ones are written to."""
    cell = Normalized().train(training)
    deq = layer(cell).train(training)
    x = torch.randn(5, 4, generator=generator(1), dtype=torch.float64)

    def through(call):
        def loss(parameters, buffers):
            return call(parameters, buffers).pow(2).sum()

        return loss

    def implicit(parameters, buffers):
        return functional_call(deq, (parameters, buffers), (torch.zeros_like(x), x))

    def iterated(parameters, buffers):
        z = torch.zeros_like(x)
        for _ in range(60):
            z = functional_call(cell, (parameters, buffers), (z, x))
        return z

    parameters, buffers = tensors_of(deq)
    got = transform(through(implicit))(parameters, buffers)
    expected = transform(through(iterated))(*tensors_of(cell))
    torch.testing.assert_close(list(got.values()), list(expected.values()), **CLOSE)
    assert int(buffers["cell.norm.num_batches_tracked"]) > 1 if training else True
    assert not int(cell.norm.num_batches_tracked)  # the module's own are left alone


def test_batch_norm_of_an_ensemble_under_transforms():
    cell = Normalized().eval()
    deq = layer(cell).eval()
    x = torch.randn(5, 4, generator=generator(1), dtype=torch.float64)
    parameters, buffers = tensors_of(deq)

    def loss(parameters, buffers):
        return functional_call(deq, (parameters, buffers), (torch.zeros_like(x), x)).pow(2).sum()

    stacked = [{name: torch.stack([t, t + 1]) for name, t in tensors.items()} for tensors in (parameters, buffers)]
    got = vmap(grad(loss))(*stacked)
    for i in range(2):
        expected = grad(loss)(*({name: t[i] for name, t in tensors.items()} for tensors in stacked))
        torch.testing.assert_close({name: t[i] for name, t in got.items()}, expected, **CLOSE)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recurrent_cells_under_transforms(kind, dtype):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = kind(4, 4, batch_first=True, dtype=dtype)
            for p in self.recurrent.parameters():
                p.data.mul_(0.5)

        def forward(self, z, x):
            return self.recurrent(z + x)[0]

    tight = 1e-6 if dtype == torch.float32 else 1e-12
    cell = Recurrent()
    deq = pydeq.DEQ(cell, adjoint=pydeq.Implicit(rtol=tight), rtol=tight, max_steps=100)
    x = torch.randn(2, 3, 4, generator=generator(1), dtype=dtype)
    parameters = {name: p.detach() for name, p in deq.named_parameters()}
    got = grad(lambda p: functional_call(deq, p, (torch.zeros_like(x), x)).pow(2).sum())(parameters)
    z = torch.zeros_like(x)
    for _ in range(60):
        z = cell(z, x)
    expected = torch.autograd.grad(z.pow(2).sum(), list(cell.parameters()))
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else CLOSE
    torch.testing.assert_close(tuple(got.values()), expected, **close)


@pytest.mark.parametrize("name", ["value", "grad", "jacfwd", "hessian"])
def test_vmap_over_an_empty_dimension(problem, name):
    weight, x, solve = problem
    of = {
        "value": solve,
        "grad": grad(square(solve)),
        "jacfwd": jacfwd(square(solve)),
        "hessian": hessian(square(solve)),
    }
    same = {"value": unrolled, "grad": grad(square(unrolled)), "jacfwd": jacfwd(square(unrolled))}
    got = vmap(of[name], (0, None))(weight.new_zeros(0, 4, 4), x)
    if name != "hessian":
        assert got.shape == vmap(same[name], (0, None))(weight.new_zeros(0, 4, 4), x).shape
    assert got.shape[0] == got.numel() == 0


def test_vectorized_forward_mode_says_what_to_use(problem):
    weight, x, solve = problem
    with pytest.raises(RuntimeError, match=r"in forward mode: use torch\.func\.jacfwd"):
        torch.autograd.functional.jacobian(lambda x: solve(weight, x), x, strategy="forward-mode", vectorize=True)


def descended(z, weight, x):
    """z - 0.3 dE/dz of the energy below, written out."""
    return z - 0.3 * (torch.sigmoid(z @ weight.T) @ weight + z - x)


def energy_of(z, weight, x):
    return torch.nn.functional.softplus(z @ weight.T).sum() + 0.5 * (z - x).square().sum()


def by_func_grad(z, weight, x):
    return z - 0.3 * grad(energy_of)(z, weight, x)


def by_func_vjp(z, weight, x):
    value, pull = torch.func.vjp(lambda z: energy_of(z, weight, x), z)
    return z - 0.3 * pull(torch.ones_like(value))[0]


def by_func_jvp(z, weight, x):
    """A directional derivative for each entry of the state."""
    along = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
    entries = [jvp(lambda z: energy_of(z, weight, x), (z,), (tangent,))[1] for tangent in along]
    return z - 0.3 * torch.stack(entries).view_as(z)


def by_vmapped_grad(z, weight, x):
    return z - 0.3 * vmap(grad(lambda z, x: energy_of(z, weight, x)))(z, x)


def by_autograd_grad(z, weight, x):
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = z if z.requires_grad else z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy_of(at, weight, x), at, create_graph=graph)
    return z - 0.3 * gradient


def by_setting_requires_grad(z, weight, x):
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = z
        if not z.requires_grad:
            at = z.clone()
            at.requires_grad = True
        (gradient,) = torch.autograd.grad(energy_of(at, weight, x), at, create_graph=graph)
    return z - 0.3 * gradient


BY_AUTOGRAD = (by_autograd_grad, by_setting_requires_grad)
BY_FUNC = (by_func_grad, by_func_vjp, by_func_jvp, by_vmapped_grad)
REVERSE = {
    "grad": grad,
    "jacrev": jacrev,
    "grad of grad": lambda f, argnums: grad(lambda *args: grad(f, argnums)(*args).square().sum(), argnums),
}
FORWARD = {
    "jacfwd": jacfwd,
    "hessian": hessian,
    "vmap": lambda f, argnums: vmap(f, (0, None) if argnums == 0 else (None, 0)),
    "vmap of grad": lambda f, argnums: vmap(grad(f, argnums), (0, None) if argnums == 0 else (None, 0)),
}


def descents(fn):
    """The sum of squares of the energy's minimum, by a layer and by iterations."""
    deq = layer(fn)

    def solved(weight, x):
        return deq(torch.zeros(3, 4, dtype=torch.float64), weight, x).square().sum()

    def iterated(weight, x):
        z = torch.zeros(3, 4, dtype=torch.float64)
        for _ in range(120):
            z = descended(z, weight, x)
        return z.square().sum()

    return solved, iterated


@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize(
    ("fn", "name"),
    [*itertools.product(BY_FUNC, REVERSE | FORWARD), *itertools.product(BY_AUTOGRAD, REVERSE)],
    ids=lambda of: of if isinstance(of, str) else of.__name__,
)
def test_cells_that_form_gradients(problem, fn, name, argnum):
    weight, x, _ = problem
    transform = (REVERSE | FORWARD)[name]
    args = [weight, x]
    if name.startswith("vmap"):
        args[argnum] = torch.stack([args[argnum], 0.5 * args[argnum]])
    solved, iterated = descents(fn)
    got, expected = transform(solved, argnum)(*args), transform(iterated, argnum)(*args)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", FORWARD)
def test_autograd_grad_in_a_cell_has_no_forward_mode_and_no_vmap(problem, name):
    """Nor has it plainly: torch.func.grad has."""
    weight, x, _ = problem
    args = (torch.stack([weight, weight]), x) if name.startswith("vmap") else (weight, x)
    solved, _ = descents(by_autograd_grad)
    for f in (solved, lambda weight, x: by_autograd_grad(x, weight, x).sum()):
        with pytest.raises(RuntimeError, match=r"attempting to call Tensor\.requires_grad_\(\)"):
            FORWARD[name](f, 0)(*args)


def by_mapping_it(z, captured, x):
    return z - 0.3 * vmap(lambda z, captured: z * captured[: len(z)], (1, 1), 1)(z, captured)[0]


@pytest.mark.parametrize("fn", [*BY_FUNC, *BY_AUTOGRAD, by_mapping_it], ids=lambda of: of.__name__)
@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: grad(f)(x),
        lambda f, x: jvp(f, (x,), (x,)),
        lambda f, x: vmap(f)(torch.stack([x, x])),
        lambda f, x: vmap(grad(f))(torch.stack([x, x])),
        lambda f, x: hessian(f)(x),
    ],
    ids=["grad", "jvp", "vmap", "vmap of grad", "hessian"],
)
@pytest.mark.parametrize("what", ["result", "argument", "leaf"])
def test_what_cells_that_form_gradients_capture_raises(problem, fn, transformed, what):
    weight, x, _ = problem
    leaf = weight.clone().requires_grad_()

    def solve(x):
        captured = {"result": weight + 0.1 * x.mean(), "argument": x.narrow(0, 0, 1), "leaf": leaf}[what]
        if what == "argument":
            captured = captured.expand(4, 4)
        deq = layer(lambda z, y: fn(z, captured, y))
        return deq(torch.zeros(3, 4, dtype=torch.float64), x).sum()

    with pytest.raises(RuntimeError, match="captures a tensor"):
        transformed(solve, x)


def by_a_hook(z, captured, x):
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        h = 0.3 * at
        h.register_hook(lambda gradient: gradient * captured[0])
        return torch.autograd.grad((h * x).sum(), at)[0]


def by_a_hook_in_backward(z, captured, x):
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        h = 0.3 * at
        h.register_hook(lambda gradient: gradient * captured[0])
        (h * x).sum().backward()
        return at.grad


def by_a_backward_function(z, captured, x):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient * captured[0]

    with torch.enable_grad():
        at = z.detach().requires_grad_()
        return torch.autograd.grad((Scaled.apply(0.3 * at) * x).sum(), at, create_graph=True)[0]


@pytest.mark.parametrize("fn", [by_a_hook, by_a_hook_in_backward, by_a_backward_function], ids=lambda of: of.__name__)
@pytest.mark.parametrize("transformed", [lambda f, w: grad(f)(w), lambda f, w: jvp(f, (w,), (w,))], ids=["grad", "jvp"])
def test_what_the_backward_pass_in_a_cell_captures_raises(problem, fn, transformed):
    """Each cell is z -> 0.3 * captured[0] * x, so the gradient is not zero."""
    weight, x, _ = problem
    torch.testing.assert_close(fn(torch.zeros_like(x), weight, x), 0.3 * weight[0] * x)

    def solve(w):
        return layer(lambda z, y: fn(z, w, y))(torch.zeros_like(x), x).sum()

    with pytest.raises(RuntimeError, match="captures a tensor"):
        transformed(solve, weight)


class Tanh(torch.autograd.Function):
    """All that torch.func asks of a Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)

    @staticmethod
    def jvp(ctx, tangent):
        (y,) = ctx.saved_tensors
        return tangent * (1 - y * y)


class Unmapped(Tanh):
    generate_vmap_rule = False


class ReverseOnly(torch.autograd.Function):
    generate_vmap_rule = True
    forward, setup_context, backward = Tanh.forward, Tanh.setup_context, Tanh.backward


class OnceOnly(torch.autograd.Function):
    generate_vmap_rule = True
    forward, setup_context = Tanh.forward, Tanh.setup_context
    backward = staticmethod(torch.autograd.function.once_differentiable(Tanh.backward))


class WithoutSetup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    backward = Tanh.backward


USES = {
    "grad": lambda f, w: grad(f)(w),
    "jacrev": lambda f, w: jacrev(f)(w),
    "jacfwd": lambda f, w: jacfwd(f)(w),
    "hessian": lambda f, w: hessian(f)(w),
    "vmap": lambda f, w: vmap(f)(torch.stack([w, 0.5 * w])),
    "dual numbers": lambda f, w: tangents(f, (w, w)),
}
SETUP, MAPPING, FORWARD_RULE = "override the setup_context", "does not have vmap support", "implement the jvp function"
UNSUITED = {
    Tanh: {},
    Unmapped: dict.fromkeys(("jacrev", "jacfwd", "hessian", "vmap"), MAPPING),
    ReverseOnly: dict.fromkeys(("jacfwd", "hessian"), FORWARD_RULE),
    OnceOnly: dict.fromkeys(("jacfwd", "hessian"), FORWARD_RULE)
    | {"dual numbers": "second derivative of fn, .* once_differentiable: give it a jvp"},
    WithoutSetup: dict.fromkeys(USES, SETUP),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("function", UNSUITED, ids=lambda of: of.__name__)
def test_functions_are_right_or_raise(problem, function, name):
    weight, x, _ = problem
    deq = layer(lambda z, w, x: function.apply(z @ w.T + x))

    def solved(weight):
        return deq(torch.zeros_like(x), weight, x).square().sum()

    message = UNSUITED[function].get(name)
    if message is not None:
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            USES[name](solved, weight)
        return
    expected = USES[name](square(lambda weight: unrolled(weight, x)), weight)
    torch.testing.assert_close(USES[name](solved, weight), expected, rtol=1e-7, atol=1e-8)


def test_a_product_that_is_formed_after_its_transform_has_ended_is_differentiated(problem):
    _, x, _ = problem
    deq = layer(lambda z, x: 0.3 * torch.sin(z) + x)

    def solved(x):
        return deq(torch.zeros_like(x), x)

    def iterated(x):
        z = torch.zeros_like(x)
        for _ in range(60):
            z = 0.3 * torch.sin(z) + x
        return z

    def pulled(f):
        return grad(lambda x: torch.func.vjp(f, x)[1](torch.cos(x))[0].square().sum())(x)

    torch.testing.assert_close(pulled(solved), pulled(iterated), rtol=1e-8, atol=1e-9)
