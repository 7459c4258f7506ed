"""Gradients where a layer meets what surrounds it: exchanged parameters, captured tensors, checkpoints, nesting."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import functional as AF
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pydeq
from pydeq.testing import CallCounter

TIGHT = {"rtol": 1e-12, "max_steps": 300}
CLOSE = {"rtol": 1e-7, "atol": 1e-8}


def exact():
    return pydeq.Implicit(solver=pydeq.Broyden(), **TIGHT)


def layer(cell, adjoint=None):
    # Anderson's system is nearly singular at the end, which costs unrolled second derivatives their digits.
    solver = pydeq.Picard() if isinstance(adjoint, pydeq.Unrolled) else pydeq.Anderson()
    return pydeq.DEQ(cell, solver=solver, adjoint=adjoint or exact(), **TIGHT)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def iterate(fn, *context, steps=300):
    z = torch.zeros(3, 5, dtype=torch.float64)
    for _ in range(steps):
        z = fn(z, *context)
    return z


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5, dtype=torch.float64)
        self.linear.weight.data = 0.15 * random(5, 5, seed=1)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


@pytest.fixture
def x():
    return random(3, 5, seed=2)


def gradients(z, tensors, second):
    """Of a loss, or of the squared length of its gradients."""
    first = torch.autograd.grad(z.pow(3).sum(), tensors, create_graph=second)
    if not second:
        return first
    return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


# Reversible has no second derivatives.
EXCHANGED = [
    (exact(), False, True),
    (exact(), False, False),
    (exact(), True, True),
    (exact(), True, False),
    (pydeq.Unrolled(checkpoint=True), False, True),
    (pydeq.Unrolled(checkpoint=True), False, False),
    (pydeq.Unrolled(checkpoint=True), True, True),
    (pydeq.Unrolled(checkpoint=True), True, False),
    (pydeq.Reversible(checkpoints=40), False, True),
    (pydeq.Reversible(checkpoints=40), False, False),
]


@pytest.mark.parametrize(("adjoint", "second", "leaf"), EXCHANGED, ids=str)
def test_parameters_exchanged_by_functional_call(x, adjoint, second, leaf):
    deq = layer(Cell(), adjoint)
    weights = {name: (1.3 * p.detach() + 0.1).requires_grad_() for name, p in deq.named_parameters()}
    used = weights if leaf else {name: 1.0 * w for name, w in weights.items()}
    z = functional_call(deq, used, (torch.zeros_like(x), x))
    got = gradients(z, list(weights.values()), second)
    cell = {name.removeprefix("cell."): w for name, w in weights.items()}
    reference = iterate(lambda z, x: functional_call(deq.cell, cell, (z, x)), x)
    torch.testing.assert_close(got, gradients(reference, list(weights.values()), second), rtol=1e-6, atol=1e-7)


def test_results_of_one_operation_are_told_apart():
    w = random(3, 10).requires_grad_()
    weight = 0.1 * random(5, 5, seed=1)

    def split():
        return (1.3 * w).chunk(2, 1)

    z0 = torch.zeros(3, 5, dtype=torch.float64)

    def fn(z, q, k):
        return torch.tanh(z @ weight + q * k)

    q, k = split()
    z = layer(lambda z, q: fn(z, q, k))(z0, q)
    with pytest.raises(RuntimeError, match="pass that tensor to the layer as context"):
        torch.autograd.grad(z.pow(3).sum(), w, create_graph=True)
    got = gradients(layer(fn)(z0, *split()), [w], second=True)
    torch.testing.assert_close(got, gradients(iterate(fn, *split()), [w], second=True), **CLOSE)


def test_a_computed_context_that_is_also_captured_refuses_a_second_derivative():
    w = random(3, 5).requires_grad_()
    weight = 0.1 * random(5, 5, seed=1)
    z0 = torch.zeros(3, 5, dtype=torch.float64)

    def capturing(h):
        return lambda z, q: torch.tanh(z @ weight + q) + 0.2 * torch.sin(h) * z

    h = 1.3 * w
    got = gradients(layer(capturing(h))(z0, h), [w], second=False)
    h = 1.3 * w
    torch.testing.assert_close(got, gradients(iterate(capturing(h), h), [w], second=False), **CLOSE)
    h = 1.3 * w
    z = layer(capturing(h))(z0, h)
    with pytest.raises(RuntimeError, match="also given as context"):
        torch.autograd.grad(z.pow(3).sum(), w, create_graph=True)


def test_a_parameter_changed_in_place_before_a_second_derivative_raises(x):
    deq = layer(Cell())
    z = deq(torch.zeros_like(x), x)
    with torch.no_grad():
        deq.cell.linear.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        torch.autograd.grad(z.pow(3).sum(), deq.cell.linear.weight, create_graph=True)


class Buffered(Cell):
    """With a buffer, a frozen parameter, and a buffer that it writes to itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((5,), 0.9, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.shift = nn.Parameter(torch.zeros(5, dtype=torch.float64), requires_grad=False)

    def forward(self, z, x):
        self.calls += 1
        return self.scale * super().forward(z, x + self.shift)


@pytest.mark.parametrize(
    "adjoint",
    [exact(), pydeq.Reversible(checkpoints=40), pydeq.Unrolled(checkpoint=True)],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("changed", ["scale", "shift", "context", None])
def test_what_is_evaluated_again_must_find_what_it_read_unchanged(x, adjoint, changed):
    """Also what gets no gradient, which autograd itself does not watch; not what the cell writes to."""
    cell = Buffered()
    deq, weight = layer(cell, adjoint), cell.linear.weight
    second = isinstance(adjoint, pydeq.Implicit)  # the others evaluate again for the first derivative
    (expected,) = gradients(deq(torch.zeros_like(x), x), [weight], second)
    z = deq(torch.zeros_like(x), x)
    deq(torch.zeros_like(x), x)  # counts
    if changed is None:
        torch.testing.assert_close(gradients(z, [weight], second)[0], expected, **CLOSE)
        return
    with torch.no_grad():
        (x if changed == "context" else getattr(cell, changed)).mul_(0.5).add_(0.1)
    # A checkpoint's own arguments are saved, so that autograd itself notices.
    own = changed == "context" and isinstance(adjoint, pydeq.Unrolled)
    message = "modified by an inplace operation" if own else "a buffer or a tensor of the context was modified in place"
    with pytest.raises(RuntimeError, match=message):
        gradients(z, [weight], second)


def test_what_changed_does_not_matter_where_nothing_is_evaluated_again(x):
    cell = Buffered()
    deq, weight = layer(cell), cell.linear.weight
    (expected,) = gradients(deq(torch.zeros_like(x), x), [weight], second=False)
    z = deq(torch.zeros_like(x), x)
    cell.calls.fill_(7)
    assert torch.equal(gradients(z, [weight], second=False)[0], expected)


@pytest.mark.parametrize(
    ("adjoint", "create_graph"),
    [(exact(), False), (exact(), True), (pydeq.Reversible(checkpoints=40), False), (pydeq.Phantom(2), True)],
    ids=str,
)
def test_hooks_of_tensors_run_once(x, adjoint, create_graph):
    """Also where gradients are formed by a call of autograd inside of backward."""
    deq, x = layer(Cell(), adjoint), x.requires_grad_()
    weight = deq.cell.linear.weight
    tensors = [weight, x]
    expected = torch.autograd.grad(deq(torch.zeros_like(x), x).pow(3).sum(), tensors)
    calls = []
    for i, tensor in enumerate(tensors):
        tensor.register_hook(lambda g, i=i: calls.append(i))
        tensor.register_hook(lambda g: 2.0 * g)
    got = torch.autograd.grad(deq(torch.zeros_like(x), x).pow(3).sum(), tensors, create_graph=create_graph)
    assert sorted(calls) == [0, 1]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.detach(), 2.0 * other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjoint", [exact(), pydeq.Phantom(2)], ids=str)
def test_a_parametrization_cache_around_a_layer(x, adjoint):
    deq = layer(Cell(), adjoint)
    parametrizations.weight_norm(deq.cell.linear)
    parameters = list(deq.parameters())
    expected = gradients(deq(torch.zeros_like(x), x), parameters, second=False)
    with parametrize.cached():
        z = deq(torch.zeros_like(x), x)
    torch.testing.assert_close(gradients(z, parameters, second=False), expected, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_layer(x, reentrant):
    deq = layer(Cell())
    parameters = list(deq.parameters())
    x = x.requires_grad_()
    deq(torch.zeros_like(x), 2.0 * x).pow(3).sum().backward()
    expected = [t.grad for t in (x, *parameters)]
    for t in (x, *parameters):
        t.grad = None
    checkpoint(deq, torch.zeros_like(x), 2.0 * x, use_reentrant=reentrant).pow(3).sum().backward()
    torch.testing.assert_close([t.grad for t in (x, *parameters)], expected, **CLOSE)


def saving(_, operator, *args, **kwargs):
    matmul = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if matmul else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "plain": {},
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, saving)},
    "late": {"early_stop": False},
}


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (pydeq.Anderson(), exact()),
        (pydeq.Anderson(), pydeq.Phantom(2)),
        (pydeq.Anderson(), pydeq.Phantom(3, form="neumann")),
        (pydeq.Broyden(), pydeq.Shine()),
        (pydeq.Broyden(), pydeq.Shine(refine_steps=4)),
        (pydeq.Picard(), pydeq.Unrolled()),
        (pydeq.Picard(), pydeq.Unrolled(checkpoint=True)),
        (pydeq.Anderson(), pydeq.Reversible(checkpoints=40)),
    ],
    ids=str,
)
def test_a_checkpoint_repeats_a_solve_once(x, options, solver, adjoint):
    """A part of a larger model, where each product with the Jacobian could ask for what the checkpoint gave up."""
    cell = CallCounter(Cell())
    first, last = (nn.Linear(5, 5, dtype=torch.float64) for _ in range(2))
    deq = pydeq.DEQ(cell, solver=solver, adjoint=adjoint, rtol=1e-8, max_steps=60)

    def part(x):
        x = first(x).relu()
        return last(deq(torch.zeros_like(x), x).sin())

    parameters = [*first.parameters(), *cell.fn.parameters(), *last.parameters()]
    expected = torch.autograd.grad(part(x).cos().sum(), parameters)
    plain = cell.calls
    loss = checkpoint(part, x, use_reentrant=False, **options).cos().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected, **CLOSE)
    assert cell.calls - plain <= 2 * plain


def test_a_second_derivative_through_a_checkpoint(x):
    deq, x = layer(Cell()), x.requires_grad_()
    tensors = [x, *deq.parameters()]
    z = checkpoint(deq, torch.zeros_like(x), 1.3 * x, use_reentrant=False)
    got = gradients(z, tensors, second=True)
    expected = gradients(iterate(deq.cell, 1.3 * x), tensors, second=True)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjoint", [exact(), pydeq.Phantom(3, form="neumann"), pydeq.Shine(refine_steps=3)], ids=str)
def test_saved_tensors_that_come_back_as_copies(x, adjoint):
    deq = pydeq.DEQ(Cell(), solver=pydeq.Broyden(), adjoint=adjoint, **TIGHT)
    parameters = list(deq.parameters())
    expected = gradients(deq(torch.zeros_like(x), x), parameters, second=False)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        z = deq(torch.zeros_like(x), x)
    torch.testing.assert_close(gradients(z, parameters, second=False), expected, **CLOSE)


class Negated(torch.autograd.Function):
    """-x, by a Function as tutorials write it."""

    @staticmethod
    def forward(ctx, x):
        return -x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Hooked(Cell):
    """With a Function and a full backward hook between what the cell is given and what it returns."""

    def __init__(self):
        super().__init__()
        self.calls = []
        for module in (self, self.linear):
            module.register_full_backward_hook(lambda module, before, after: self.calls.append(after[0]))

    def forward(self, z, x):
        return Negated.apply(torch.tanh(self.linear(Negated.apply(z)) + Negated.apply(x)))


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("module", [False, True])
def test_functions_and_backward_hooks_in_a_cell(x, module, second):
    cell = Hooked()
    deq, x = layer(cell if module else lambda z, x: cell(z, x)), x.requires_grad_()
    tensors = [x, *cell.parameters()]
    got = gradients(deq(torch.zeros_like(x), 1.3 * x), tensors, second)
    assert any(gradient is not None for gradient in cell.calls)

    def reference(z, x):
        return -torch.tanh(nn.functional.linear(-z, cell.linear.weight, cell.linear.bias) - x)

    expected = gradients(iterate(reference, 1.3 * x, steps=60), tensors, second)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def adapted(model, parameters, steps):
    """MAML's inner loop: parameters after some steps of gradient descent, as functions of the first ones."""
    for _ in range(steps):
        loss = (model(parameters) - 0.3).square().sum()
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), found, strict=True)}
    return parameters


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_learning_through_a_layer(x, steps):
    cell = Cell()
    deq = layer(cell)
    parameters = dict(cell.named_parameters())

    def implicit(parameters):
        named = {f"cell.{name}": p for name, p in parameters.items()}
        return functional_call(deq, named, (torch.zeros_like(x), x))

    def unrolled(parameters):
        return iterate(lambda z, x: functional_call(cell, parameters, (z, x)), x, steps=60)

    found = []
    for model in (implicit, unrolled):
        loss = (model(adapted(model, parameters, steps)) + 0.2).square().sum()
        found.append(torch.autograd.grad(loss, list(parameters.values())))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("product", [AF.hvp, AF.vhp], ids=["hvp", "vhp"])
@pytest.mark.parametrize("of", ["context", "parameters"])
def test_hessian_vector_products_of_torch_autograd(x, product, of):
    cell = Cell()
    deq = layer(cell)
    names = [name for name, _ in cell.named_parameters()]

    def through(solve):
        if of == "context":
            return lambda x: solve(cell, x).pow(3).sum()
        return lambda *tensors: solve(functools.partial(called, tensors), x).pow(3).sum()

    def called(tensors, z, x):
        return functional_call(cell, dict(zip(names, tensors, strict=True)), (z, x))

    def implicit(cell, x):
        if of == "context":
            return deq(torch.zeros_like(x), x)
        named = {f"cell.{name}": p for name, p in zip(names, cell.args[0], strict=True)}
        return functional_call(deq, named, (torch.zeros_like(x), x))

    at = x if of == "context" else tuple(p.detach() for p in cell.parameters())
    v = random(3, 5, seed=7) if of == "context" else tuple(random(*p.shape, seed=7) for p in at)
    got = product(through(implicit), at, v)
    expected = product(through(lambda cell, x: iterate(cell, x, steps=60)), at, v)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_a_layer_inside_of_a_cell(x, second):
    inner, u = Cell(), (0.2 * random(5, 5, seed=4)).requires_grad_()
    inside = layer(inner)

    def outer(z, x, solve):
        return torch.tanh(0.3 * solve(z @ u + x) + x)

    deq = layer(lambda z, x: outer(z, x, lambda y: inside(torch.zeros_like(y), y)))
    x = x.requires_grad_()
    tensors = [u, *inner.parameters(), x]
    got = gradients(deq(torch.zeros_like(x), 1.0 * x), tensors, second)
    reference = iterate(lambda z: outer(z, x, lambda y: iterate(inner, y, steps=60)), steps=40)
    torch.testing.assert_close(got, gradients(reference, tensors, second), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "adjoint", [exact(), pydeq.Phantom(2, form="neumann"), pydeq.Shine()], ids=lambda a: type(a).__name__
)
def test_the_output_may_be_modified_in_place(x, adjoint):
    deq = pydeq.DEQ(Cell(), solver=pydeq.Broyden(), adjoint=adjoint, **TIGHT)
    weight = deq.cell.linear.weight
    (expected,) = torch.autograd.grad(deq(torch.zeros_like(x), x).relu().sum(), weight)
    (got,) = torch.autograd.grad(deq(torch.zeros_like(x), x).relu_().sum(), weight)
    assert torch.equal(got, expected)


EVERY = [
    (pydeq.Anderson(), exact()),
    (pydeq.Anderson(), pydeq.Phantom(2)),
    (pydeq.Anderson(), pydeq.Phantom(2, form="neumann")),
    (pydeq.Broyden(), pydeq.Shine()),
    (pydeq.Picard(), pydeq.Unrolled()),
    (pydeq.Picard(), pydeq.Unrolled(checkpoint=True)),
    (pydeq.Anderson(), pydeq.Reversible(checkpoints=40)),
]


@pytest.mark.parametrize(("solver", "adjoint"), EVERY, ids=str)
def test_backward_twice_repeats_with_retain_graph_and_raises_without(x, solver, adjoint):
    deq = pydeq.DEQ(Cell(), solver=solver, adjoint=adjoint, **TIGHT)
    weight = deq.cell.linear.weight
    loss = deq(torch.zeros_like(x), x).pow(3).sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, weight)


class Tied(nn.Module):
    """One weight under two names, in two places, once transposed."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = (nn.Linear(5, 5, bias=False, dtype=torch.float64) for _ in range(2))
        self.inner.weight.data = 0.2 * random(5, 5, seed=1)
        self.outer.weight = self.inner.weight

    def forward(self, z, x):
        return torch.tanh(self.outer(torch.sin(self.inner(z))) + x @ self.inner.weight)


@pytest.mark.parametrize(("solver", "adjoint"), EVERY, ids=str)
def test_a_cell_whose_parameters_are_shared(x, solver, adjoint):
    cell = Tied()
    approximate = isinstance(adjoint, pydeq.Phantom | pydeq.Shine)
    deq = pydeq.DEQ(cell, solver=solver, adjoint=adjoint, **TIGHT)
    (got,) = gradients(deq(torch.zeros_like(x), x), [cell.inner.weight], second=False)
    if approximate:  # of two parameters that happen to be equal
        apart = Tied()
        apart.outer.weight = nn.Parameter(apart.inner.weight.detach().clone())
        deq = pydeq.DEQ(apart, solver=solver, adjoint=adjoint, **TIGHT)
        weights = [apart.inner.weight, apart.outer.weight]
        expected = sum(gradients(deq(torch.zeros_like(x), x), weights, second=False))
    else:
        (expected,) = gradients(iterate(cell, x), [cell.inner.weight], second=False)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert len(list(deq.parameters())) == (2 if approximate else 1)


def test_old_vectorization_says_what_to_use(x):
    deq = layer(Cell())
    with pytest.raises(RuntimeError, match=r"torch\.func\.jacrev"):
        torch.autograd.functional.jacobian(lambda x: deq(torch.zeros_like(x), x), x, vectorize=True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("solver", "adjoint", "works"),
    [
        (pydeq.Anderson(), exact(), False),
        (pydeq.Broyden(), pydeq.Shine(), False),
        (pydeq.Broyden(), pydeq.Shine(refine_steps=2), False),
        (pydeq.Anderson(), pydeq.Reversible(), False),
        (pydeq.Anderson(), pydeq.Phantom(3), True),
        (pydeq.Anderson(), pydeq.Phantom(3, form="neumann"), True),
        (pydeq.Picard(), pydeq.Unrolled(), True),
        (pydeq.Picard(), pydeq.Unrolled(checkpoint=True), True),
    ],
    ids=str,
)
def test_batched_cotangents_work_or_say_what_to_use(x, solver, adjoint, works, create_graph):
    deq = pydeq.DEQ(Cell(), solver=solver, adjoint=adjoint, rtol=1e-6)
    weight, v = deq.cell.linear.weight, random(4, 3, 5, seed=3)
    z = deq(torch.zeros_like(x), x)
    options = {"is_grads_batched": True, "retain_graph": True, "create_graph": create_graph}
    if not works:
        with pytest.raises(RuntimeError, match=f"with {type(adjoint).__name__} cannot be differentiated by is_grads_b"):
            torch.autograd.grad(z, weight, v, **options)
        return
    (got,) = torch.autograd.grad(z, weight, v, **options)
    expected = torch.stack([torch.autograd.grad(z, weight, one, retain_graph=True)[0] for one in v])
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_penalty_under_transforms_says_what_to_use(x):
    deq = layer(Cell())

    def loss(x):
        z, solution = deq(torch.zeros_like(x), x, return_solution=True, penalty=pydeq.JacobianPenalty(1.0))
        return z.sum() + solution.penalty

    with pytest.raises(RuntimeError, match=r"pydeq\.jacobian_penalty"):
        torch.func.grad(loss)(x)


class Switching(Cell):
    """Other values in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64)
        self.norm.running_mean.fill_(0.3)
        self.norm.weight.data.fill_(0.3)

    def forward(self, z, x):
        return torch.tanh(self.norm(self.linear(z)) + x)


@pytest.mark.parametrize(
    ("adjoint", "second", "again"),
    [
        (exact(), False, False),
        (exact(), True, True),
        (pydeq.Phantom(2), True, False),
        (pydeq.Unrolled(), False, False),
        (pydeq.Unrolled(checkpoint=True), False, True),
        (pydeq.Reversible(checkpoints=40), False, True),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the samples of a batch depend on each other through BatchNorm")
def test_a_mode_that_changes_before_f_is_evaluated_again_raises(x, adjoint, second, again):
    deq = layer(Switching(), adjoint).eval()
    weight = deq.cell.linear.weight
    z = deq(torch.zeros_like(x), x)
    (expected,) = torch.autograd.grad(z.pow(3).sum(), weight, retain_graph=True)
    deq.train()
    if again:
        with pytest.raises(RuntimeError, match="was in eval mode in forward and is in train mode in backward"):
            torch.autograd.grad(z.pow(3).sum(), weight, create_graph=second, retain_graph=True)
        deq.eval()  # nothing is lost
    (got,) = torch.autograd.grad(z.pow(3).sum(), weight, create_graph=second)
    torch.testing.assert_close(got.detach(), expected, **CLOSE)


class Scripted(nn.Module):
    """With a part in TorchScript."""

    def __init__(self):
        super().__init__()
        part = nn.Sequential(nn.Linear(5, 5, dtype=torch.float64), nn.Tanh())
        part[0].weight.data = 0.15 * random(5, 5, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            self.part = torch.jit.script(part)
        self.register_buffer("scale", torch.full((5,), 0.9, dtype=torch.float64))

    def forward(self, z, x):
        return 0.7 * self.part(z) + self.scale * x


@pytest.mark.parametrize(("solver", "adjoint"), EVERY, ids=str)
def test_torchscript_in_a_cell(x, solver, adjoint):
    cell = Scripted()
    deq = pydeq.DEQ(cell, solver=solver, adjoint=adjoint, **TIGHT)
    parameters = list(cell.parameters())
    got = gradients(deq(torch.zeros_like(x), x), parameters, second=False)
    if isinstance(adjoint, pydeq.Phantom | pydeq.Shine):
        linear = nn.Linear(5, 5, dtype=torch.float64)
        linear.load_state_dict(cell.part[0].state_dict())
        eager = pydeq.DEQ(lambda z, x: 0.7 * torch.tanh(linear(z)) + 0.9 * x, solver=solver, adjoint=adjoint, **TIGHT)
        expected = gradients(eager(torch.zeros_like(x), x), list(linear.parameters()), second=False)
    else:
        expected = gradients(iterate(cell, x, steps=100), parameters, second=False)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_torchscript_in_a_cell_under_transforms_and_twice(x):
    cell = Scripted()
    deq, (weight, bias) = layer(cell), cell.parameters()
    expected = gradients(iterate(cell, x, steps=60), [weight], second=True)
    got = gradients(deq(torch.zeros_like(x), x), [weight], second=True)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    named = {name: p.detach() for name, p in deq.named_parameters()}
    found = torch.func.grad(lambda p: functional_call(deq, p, (torch.zeros_like(x), x)).pow(3).sum())(named)
    expected = gradients(iterate(cell, x, steps=60), [weight, bias], second=False)
    torch.testing.assert_close(tuple(found.values()), expected, **CLOSE)


@pytest.mark.parametrize("computed", [False, True], ids=["leaf", "computed"])
@pytest.mark.parametrize(("solver", "adjoint"), EVERY, ids=str)
def test_an_empty_batch_gets_gradients_of_zero(solver, adjoint, computed):
    deq = pydeq.DEQ(Cell(), solver=solver, adjoint=adjoint, **TIGHT)
    x = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    z, solution = deq(torch.zeros(0, 5, dtype=torch.float64), 2.0 * x if computed else x, return_solution=True)
    assert (solution.nfe, z.shape) == (0, (0, 5))
    z.sum().backward()
    assert x.grad.shape == (0, 5)
    assert all(p.grad is not None and not p.grad.any() for p in deq.parameters())


@pytest.mark.parametrize(
    "adjoint",
    [exact(), pydeq.Unrolled(), pydeq.Unrolled(checkpoint=True), pydeq.Reversible(checkpoints=40)],
    ids=repr,
)
def test_an_initial_state_made_in_inference_mode(x, adjoint):
    cell = Cell()
    with torch.inference_mode():
        z0 = torch.zeros(3, 5, dtype=torch.float64)
    found = gradients(layer(cell, adjoint)(z0, x), list(cell.parameters()), second=False)
    expected = gradients(iterate(cell, x), list(cell.parameters()), second=False)
    torch.testing.assert_close(found, expected, **CLOSE)
