"""The implicit graph network: against dense matrices, bounded, and unable to see over the edge of its graph."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import graph, ignn

from pydeq.models.ignn import normalized_edges


def dense(edges, nodes):
    adjacency = torch.eye(nodes, dtype=torch.float64)
    for source, target in edges.T.tolist():
        adjacency[target, source] += 1.0
    return adjacency / torch.outer(adjacency.sum(1), adjacency.sum(0)).sqrt()


@given(nodes=st.integers(1, 9), seed=st.integers(0, 30), directed=st.booleans())
def test_edges_are_those_of_the_normalized_adjacency(nodes, seed, directed):
    edges = torch.randint(nodes, (2, 2 * nodes), generator=torch.Generator().manual_seed(seed))
    if not directed:
        edges = torch.cat([edges, edges.flip(0)], dim=1)
    sources, targets, weights = normalized_edges(edges, nodes, torch.float64)
    found = torch.zeros(nodes, nodes, dtype=torch.float64).index_put_((targets, sources), weights, accumulate=True)
    torch.testing.assert_close(found, dense(edges, nodes), rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.matrix_norm(found, 2)) < 1.0 + 1e-12


def test_equilibrium_is_that_of_the_dense_equation():
    generator = torch.Generator().manual_seed(0)
    model, edges = ignn().eval(), graph(9, generator)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        scores, solution = model(x, edges, return_solution=True)
        z, A, W = solution.image[0], dense(edges, 9), model.bounded_weight()
        expected = (A @ z @ W.T + A @ x @ model.injection.weight.T + model.bias).relu()
        torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(scores, model.output(z))


def test_weights_are_bounded_and_small_ones_left_alone():
    model = ignn()
    with torch.no_grad():
        model.recurrent.copy_(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 10)
        model.recurrent[0] = 0.1
        model.recurrent[1] = 0.0
        norms = model.bounded_weight().abs().sum(1)
        assert norms.max() <= 0.8 * (1 + 1e-12)
        assert torch.equal(model.bounded_weight()[:2], model.recurrent[:2])
        assert model(torch.randn(9, 4).double(), graph(9, torch.Generator()), return_solution=True)[1].converged.all()


def test_information_reaches_the_whole_graph_and_no_other():
    generator = torch.Generator().manual_seed(0)
    chain = torch.stack([torch.arange(5), torch.arange(1, 6)])
    edges = torch.cat([chain, chain.flip(0), torch.tensor([[6, 7], [7, 6]])], dim=1)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64).requires_grad_()
    model = ignn(seed=1)
    torch.nn.init.ones_(model.recurrent)  # no path is cut by a relu
    torch.nn.init.ones_(model.bias)
    (gradient,) = torch.autograd.grad(model(x, edges)[0].sum(), x)
    reached = gradient.abs().amax(1) > 1e-9
    assert reached.tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("features", "edges", "error", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(2, 1, dtype=torch.long), ValueError, r"features must be of shape \(nodes, 4\)"),
        (torch.zeros(3, 4), torch.zeros(2, 1), TypeError, "edges must be a tensor of int64"),
        (torch.zeros(3, 4), torch.zeros(1, 2, dtype=torch.long), ValueError, r"edges must be of shape \(2, edges\)"),
        (torch.zeros(3, 4), torch.full((2, 1), 3), ValueError, r"edges must name nodes in \[0, 3\)"),
    ],
)
def test_bad_input(features, edges, error, message):
    with pytest.raises(error, match=message):
        ignn().float()(features, edges)


def test_bad_bound():
    with pytest.raises(ValueError, match=r"bound must be in \(0, 1\)"):
        ignn(bound=1.0)
