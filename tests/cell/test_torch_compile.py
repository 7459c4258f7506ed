"""torch.compile around and inside of a layer. The backend records graphs and runs them as they are."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import pydeq

pytestmark = [
    # Dynamo looks at the .grad of what comes out of one graph and goes into the next.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # It imports parts of torch that use what torch deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]


class Recorder:
    """A backend of torch.compile that keeps its graphs and runs them through AOTAutograd, without generating code."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(graph)
        return aot_eager(graph, inputs)


class Cell(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.linear = nn.Linear(dim, dim, dtype=torch.float64)
        self.linear.weight.data.normal_(std=0.15, generator=torch.Generator().manual_seed(1))

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x).sin()


class Model(nn.Module):
    def __init__(self, solver=pydeq.Broyden(), **options):  # noqa: B008  # a constant
        super().__init__()
        self.first = nn.Linear(6, 6, dtype=torch.float64)
        self.deq = pydeq.DEQ(Cell(), solver=solver, rtol=1e-10, **options)
        self.last = nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.deq(torch.zeros_like(x), x))


class Deep(Model):
    """Two layers with something between."""

    def __init__(self):
        super().__init__()
        self.second = pydeq.DEQ(Cell(), solver=pydeq.Broyden(), rtol=1e-10)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.deq(torch.zeros_like(x), x).cos()
        return self.last(self.second(torch.zeros_like(x), x))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradients(model, x, call):
    model.zero_grad()
    output = call(x)
    output.square().sum().backward()
    return output.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def frames():
    """Names of the functions of this package that are compiled."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    root, found = Path(pydeq.__file__).parent, []

    def note(code, compiled):
        if root in Path(code.co_filename).parents:
            found.append(code.co_name)

    handle = register_bytecode_hook(note)
    yield found
    handle.remove()


def cells(graphs):
    return sum("tanh" in graph.code for graph in graphs)


@pytest.mark.parametrize(
    "adjoint", [pydeq.Implicit(rtol=1e-10), pydeq.JacobianFree()], ids=["Implicit", "JacobianFree"]
)
def test_a_compiled_model_has_one_graph_break_per_layer_and_two_variants_of_a_cell(x, adjoint):
    model = Model(adjoint=adjoint)
    backend = Recorder()
    compiled = torch.compile(model, backend=backend)
    expected = gradients(model, x, model)
    torch.testing.assert_close(gradients(model, x, compiled), expected, rtol=1e-8, atol=1e-9)
    assert cells(backend.graphs) == 2  # without gradients, and with
    assert len(backend.graphs) == 2 + 2  # before the break, and after
    for scale in (0.5, 2.0):  # nothing more on later calls
        gradients(model, scale * x, compiled)
    assert len(backend.graphs) == 4
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected[0], rtol=1e-8, atol=1e-9)
    assert cells(backend.graphs) == 2


def test_two_layers_are_two_graph_breaks(x):
    model = Deep()
    backend = Recorder()
    compiled = torch.compile(model, backend=backend)
    expected = gradients(model, x, model)
    torch.testing.assert_close(gradients(model, x, compiled), expected, rtol=1e-6, atol=1e-7)
    assert len(backend.graphs) - cells(backend.graphs) == 3
    assert cells(backend.graphs) <= 4  # two cells of one class may share theirs


def test_a_compiled_cell_in_an_eager_layer(x):
    cell, backend = Cell(), Recorder()
    eager = pydeq.DEQ(cell, solver=pydeq.Broyden(), rtol=1e-10)
    deq = pydeq.DEQ(torch.compile(cell, backend=backend), solver=pydeq.Broyden(), rtol=1e-10)
    z0 = torch.zeros_like(x)
    expected = gradients(eager, x, lambda x: eager(z0, x))
    x = x.requires_grad_()
    for _ in range(2):
        torch.testing.assert_close(gradients(deq, x, lambda x: deq(z0, x)), expected, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        deq(z0, x)
    assert len(backend.graphs) == 2


def test_a_penalty_by_products_takes_the_uncompiled_cell(x):
    """What the compiler leaves cannot be differentiated twice."""
    cell, backend = Cell(), Recorder()
    options = {"solver": pydeq.Broyden(), "rtol": 1e-10}
    found = []
    for each in (cell, torch.compile(cell, backend=backend)):
        deq = pydeq.DEQ(each, **options)
        torch.manual_seed(0)
        penalty = pydeq.JacobianPenalty(0.5, probes=3, mode="vjp")
        z, solution = deq(torch.zeros_like(x), x, return_solution=True, penalty=penalty)
        loss = z.square().sum() + solution.penalty
        found.append((solution.penalty.detach(), *torch.autograd.grad(loss, list(cell.parameters()))))
    assert backend.graphs
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


def test_a_penalty_of_a_compiled_cell_that_draws_says_what_to_use(x):
    cell = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), nn.Dropout(0.5))

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = cell

        def forward(self, z, x):
            return torch.tanh(0.1 * self.inner(z) + x)

    deq = pydeq.DEQ(torch.compile(Noisy(), backend=Recorder()), freeze_rng=True)
    with pytest.raises(RuntimeError, match=r"use pydeq\.nn\.VariationalDropout or mode='difference', or do not"):
        deq(torch.zeros_like(x), x, return_solution=True, penalty=pydeq.JacobianPenalty(1.0, mode="vjp"))
    penalty = pydeq.JacobianPenalty(1.0, mode="difference")
    _, solution = deq(torch.zeros_like(x), x, return_solution=True, penalty=penalty)
    assert 0.0 < solution.penalty < 0.1  # with another mask in one evaluation it would be some ten


def test_the_whole_graph_at_once_is_refused_by_the_compiler(x):
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Model(), backend=Recorder(), fullgraph=True)(x)


def test_a_cell_that_raises_leaves_the_compiler_on(x):
    class Failing(nn.Module):
        def forward(self, z, x):
            raise RuntimeError("from the cell")

    model, backend = Model(), Recorder()
    compiled = torch.compile(model, backend=backend)
    model.deq.cell = Failing()
    with pytest.raises(RuntimeError, match="from the cell"):
        compiled(x)
    model.deq.cell = Cell()
    compiled(x)
    assert cells(backend.graphs) == 2


EVERY = [
    (pydeq.Anderson(), pydeq.Implicit(rtol=1e-10)),
    (pydeq.Anderson(), pydeq.Phantom(2)),
    (pydeq.Anderson(), pydeq.Phantom(2, form="neumann")),
    (pydeq.Broyden(), pydeq.Shine()),
    (pydeq.Broyden(), pydeq.Shine(refine_steps=3)),
    (pydeq.Anderson(), pydeq.Unrolled()),
    (pydeq.Anderson(), pydeq.Unrolled(checkpoint=True)),
    (pydeq.Anderson(), pydeq.Reversible()),
]


def step_of(model, optimizer):
    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def trained(model, x, compile=None, steps=3):
    """Losses and parameters after some steps."""
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    if compile is not None:
        step = torch.compile(step, backend=compile)
    losses = [step((1.0 + 0.1 * i) * x) for i in range(steps)]
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("solver", "adjoint"), EVERY, ids=str)
def test_a_whole_training_step_compiles_what_is_not_the_solvers(x, frames, solver, adjoint):
    model = Model(solver, adjoint=adjoint)
    eager, backend = copy.deepcopy(model), Recorder()
    torch.testing.assert_close(trained(model, x, backend), trained(eager, x), rtol=1e-9, atol=1e-10)
    assert not frames
    # Without gradients, and with; with and without a gradient of z where evaluations follow each other.
    assert cells(backend.graphs) == (3 if adjoint == pydeq.Phantom(2) else 2)


class Block(nn.Module):
    """A transformer's block with injection."""

    def __init__(self, dim=8):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        for part in (self.qkv, self.out, self.up, self.down):
            part.weight.data.mul_(0.3)

    def forward(self, z, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(z + x).chunk(3, -1))
        attention = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = self.first(z + self.out(attention.transpose(1, 2).flatten(2)) + x)
        return 0.5 * self.second(z + self.down(nn.functional.gelu(self.up(z))))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        adjoint = pydeq.Implicit(rtol=1e-8)
        self.deq = pydeq.DEQ(Block(), adjoint=adjoint, rtol=1e-8, max_steps=80)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.deq(torch.zeros_like(x), x))


def test_a_compiled_step_of_a_language_model(frames):
    torch.manual_seed(0)
    model = Language().double()
    eager = copy.deepcopy(model)
    tokens = torch.randint(11, (3, 7))

    def run(model, wrap):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step(tokens):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        step = wrap(step)
        losses = [step(tokens) for _ in range(2)]
        return losses, list(model.parameters())

    backend = Recorder()
    got = run(model, lambda step: torch.compile(step, backend=backend))
    # The compiled optimizer corrects its bias in float32.
    torch.testing.assert_close(got, run(eager, lambda step: step), rtol=1e-5, atol=1e-5)
    assert not frames


def test_a_solve_in_compiled_code(x, frames):
    cell, backend = Cell(), Recorder()

    def solve(x):
        return 2.0 * pydeq.fixed_point(cell, torch.zeros_like(x), x.sin(), rtol=1e-10).image

    expected = solve(x)
    for _ in range(2):
        torch.testing.assert_close(torch.compile(solve, backend=backend)(x), expected, rtol=1e-9, atol=1e-10)
    assert not frames
    assert cells(backend.graphs) == 1


@pytest.mark.parametrize(("solver", "adjoint"), [*EVERY[:4], EVERY[-1]], ids=str)
def test_compiled_autograd_is_right_or_refused(x, solver, adjoint):
    from torch._dynamo import compiled_autograd

    model = Model(solver, adjoint=adjoint)
    expected = gradients(model, x, model)
    loss = model(x).square().sum()
    model.zero_grad()
    if isinstance(adjoint, pydeq.Implicit | pydeq.Shine) or getattr(adjoint, "form", "") == "neumann":
        with (
            compiled_autograd._enable(torch.compile(backend="eager")),
            pytest.raises(RuntimeError, match=r"leave torch\._dynamo\.config"),
        ):
            loss.backward()
        return
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected[1], rtol=1e-9, atol=1e-10)


def test_a_compiled_step_takes_batches_of_another_size(x):
    deq = pydeq.DEQ(Cell(), rtol=1e-10, adjoint=pydeq.Implicit(rtol=1e-10))

    def step(x):
        return deq(torch.zeros_like(x), x)

    compiled = torch.compile(step)
    for batch in (x, x[:3], x[:2]):
        expected, wanted = gradients(deq, batch, step)
        output, found = gradients(deq, batch, compiled)
        torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)
