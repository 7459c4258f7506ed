"""torch.compile around and inside of a layer. The backend records graphs and runs them as they are."""

import pytest
import torch
from torch import nn

import pydeq

# Dynamo looks at the .grad of what comes out of one graph and goes into the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


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
    def __init__(self, **options):
        super().__init__()
        self.first = nn.Linear(6, 6, dtype=torch.float64)
        self.deq = pydeq.DEQ(Cell(), solver=pydeq.Broyden(), rtol=1e-10, **options)
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


def test_a_penalty_takes_the_uncompiled_cell(x):
    """What the compiler leaves cannot be differentiated twice."""
    cell, backend = Cell(), Recorder()
    options = {"solver": pydeq.Broyden(), "rtol": 1e-10}
    found = []
    for each in (cell, torch.compile(cell, backend=backend)):
        deq = pydeq.DEQ(each, **options)
        torch.manual_seed(0)
        penalty = pydeq.JacobianPenalty(0.5, probes=3)
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
    with pytest.raises(RuntimeError, match=r"a penalty needs: use pydeq\.nn\.VariationalDropout, or do not compile"):
        deq(torch.zeros_like(x), x, return_solution=True, penalty=pydeq.JacobianPenalty(1.0))


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
