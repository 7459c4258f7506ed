import collections
import pickle

import numpy as np
import pytest
import torch
from formats import python2_pickle
from scipy import sparse

from experiments.data import AlteredDataError, graphs, load_graph
from experiments.data.graphs import parse_citations, parse_planetoid
from pydeq.models.ignn import normalized_edges

ALLX, TEST, FEATURES, CLASSES, TRAIN = 8, [11, 8, 10], 5, 3, 3


def one_hot(labels):
    return np.eye(CLASSES, dtype=np.int32)[labels]


def planetoid(**changes):
    """Nodes 0 to 7 in allx, three of 8 to 11 in tx: like CiteSeer, where node 9 is missing."""
    random = np.random.default_rng(0)
    allx = sparse.csr_matrix((random.random((ALLX, FEATURES)) < 0.5).astype(np.float32))
    tx = sparse.csr_matrix((random.random((len(TEST), FEATURES)) < 0.5).astype(np.float32))
    ally, ty = one_hot(random.integers(0, CLASSES, ALLX)), one_hot([2, 0, 1])
    graph = {node: [] for node in range(12)}
    # Once each way, one way only, twice, and to itself.
    graph |= {0: [1, 11], 1: [0], 2: [3, 3], 5: [5], 8: [10]}
    parts = {
        "x": allx[:TRAIN], "tx": tx, "allx": allx, "y": ally[:TRAIN], "ty": ty, "ally": ally,
        "graph": collections.defaultdict(list, graph),
    }  # fmt: skip
    contents = {f"ind.cora.{part}": python2_pickle(changes.get(part, value)) for part, value in parts.items()}
    index = changes.get("index", TEST)
    contents["ind.cora.test.index"] = "".join(f"{node}\n" for node in index).encode()
    return parts, contents


def test_planetoid_with_a_node_that_is_missing():
    parts, contents = planetoid()
    graph = parse_planetoid(contents, "cora")
    assert len(graph) == 12
    assert graph.classes == CLASSES
    assert graph.features.dtype == torch.float32
    assert np.array_equal(graph.features[:ALLX].numpy(), parts["allx"].toarray())
    # tx is in the order of test.index, which is none.
    assert np.array_equal(graph.features[TEST].numpy(), parts["tx"].toarray())
    assert graph.features[9].abs().sum() == 0
    assert graph.labels.tolist() == [*parts["ally"].argmax(axis=1), 0, -1, 1, 2]
    assert graph.edges.tolist() == [[0, 0, 1, 2, 3, 8, 10, 11], [1, 11, 0, 3, 2, 10, 8, 0]]
    assert graph.train.nonzero().flatten().tolist() == [0, 1, 2]
    assert graph.valid.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert graph.test.nonzero().flatten().tolist() == [8, 10, 11]


def test_what_the_implicit_graph_network_takes():
    graph = parse_planetoid(planetoid()[1], "cora")
    dense = torch.zeros(12, 12)
    dense[graph.edges[0], graph.edges[1]] = 1
    dense += torch.eye(12)
    scale = dense.sum(dim=1).rsqrt()
    expected = scale[:, None] * dense * scale
    torch.testing.assert_close(graph.adjacency().to_dense(), expected)
    assert graph.adjacency(torch.float64).dtype == torch.float64
    sources, targets, weights = normalized_edges(graph.edges, len(graph), torch.float32)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    messages = torch.zeros(12, 4).index_add(0, targets, x[sources] * weights[:, None])
    torch.testing.assert_close(graph.adjacency() @ x, messages)


def test_features_that_sum_to_one():
    graph = parse_planetoid(planetoid()[1], "cora")
    normalized = graph.row_normalized()
    sums = normalized.features.sum(dim=1)
    empty = graph.features.sum(dim=1) == 0
    assert empty[9]
    assert torch.equal(sums[empty], torch.zeros(int(empty.sum())))
    torch.testing.assert_close(sums[~empty], torch.ones(int((~empty).sum())))
    assert torch.equal(normalized.edges, graph.edges)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": [11, 8, 7]}, r"ind\.cora\.test\.index must name 3 nodes.* none below 8"),
        ({"index": [11, 8, 8]}, r"test\.index must name 3 nodes"),
        ({"index": [11, 8]}, r"test\.index must name 3 nodes"),
        ({"index": ["a", "b", "c"]}, r"test\.index must be whole numbers"),
        ({"graph": {0: [12]}}, r"graph must name pairs of nodes in \[0, 12\)"),
        ({"graph": {-1: [0]}}, r"graph must name pairs of nodes in \[0, 12\)"),
        ({"graph": {0: ["a"]}}, r"graph must name pairs of nodes"),
        ({"graph": {0: [1.5]}}, r"graph must name pairs of nodes"),
        ({"graph": [1, 2]}, r"graph must hold a mapping"),
        ({"allx": np.ones((8, 5))}, r"ind\.cora\.allx must hold a sparse matrix in CSR format, got ndarray"),
        ({"ally": np.ones(8)}, r"ally must hold an array of numbers of 2 dimensions, got float64 of shape \(8,\)"),
        ({"ally": np.ones((8, 3))}, "labels must be one-hot"),
        ({"ally": one_hot([0] * 7)}, "equally many rows"),
        ({"ty": one_hot([0, 1, 2])[:, :2]}, "equally many columns"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_planetoid(planetoid(**change)[1], "cora")


def test_load_graph_reads_the_cache(publish, write, cache):
    contents = planetoid()[1]
    publish("cora", contents)
    write(cache / "cora", contents)
    graph = load_graph("cora")
    assert torch.equal(graph.edges, parse_planetoid(contents, "cora").edges)


def test_a_pickle_is_opened_only_when_its_sum_is_right(publish, write, cache, monkeypatch):
    contents = planetoid()[1]
    publish("cora", contents)
    name = "ind.cora.graph"
    # Another graph of the same size.
    altered = contents[name].replace(b"K\x0b", b"K\x0a")
    assert len(altered) == len(contents[name])
    assert pickle.loads(altered) != pickle.loads(contents[name])
    write(cache / "cora", contents | {name: altered})
    monkeypatch.setattr(graphs, "read_pickle", lambda *_: pytest.fail("a pickle was opened"))
    with pytest.raises(AlteredDataError, match=r"ind\.cora\.graph is not ind\.cora\.graph as published"):
        load_graph("cora")


def citations(classes=2, rest=30):
    count = graphs.PER_CLASS * classes + rest
    lines = [f"paper{i}\t{i % 2}\t1\t0\tclass{i % classes}" for i in range(count)]
    return "\n".join(lines).encode(), b"paper0\tpaper1\npaper3\tpaper0\npaper1\tpaper0\n"


def test_raw_citations_get_a_split_that_never_changes(monkeypatch):
    monkeypatch.setattr(graphs, "VALID", 10)
    monkeypatch.setattr(graphs, "TEST", 15)
    content, cites = citations()
    graph = parse_citations(content, cites)
    assert graph.features.shape == (70, 3)
    assert graph.features[1].tolist() == [1, 1, 0]
    assert graph.labels[:4].tolist() == [0, 1, 0, 1]
    assert graph.edges.tolist() == [[0, 0, 1, 3], [1, 3, 0, 0]]
    assert torch.bincount(graph.labels[graph.train]).tolist() == [20, 20]
    assert (int(graph.valid.sum()), int(graph.test.sum())) == (10, 15)
    assert not (graph.train & graph.valid | graph.train & graph.test | graph.valid & graph.test).any()
    assert graph.valid.nonzero().flatten().tolist() == [4, 9, 10, 18, 22, 26, 27, 43, 44, 47]


def test_raw_citations_that_do_not_fit_are_refused(monkeypatch):
    content, cites = citations()
    with pytest.raises(ValueError, match="20 papers of each of 2 classes and 1500 more"):
        parse_citations(content, cites)
    monkeypatch.setattr(graphs, "VALID", 0)
    monkeypatch.setattr(graphs, "TEST", 0)
    with pytest.raises(ValueError, match=r"must name papers of cora\.content, got nobody"):
        parse_citations(content, b"paper0 nobody\n")
    with pytest.raises(ValueError, match="lines of two papers' names"):
        parse_citations(content, b"paper0 paper1\npaper0 paper1 paper2\n")
    with pytest.raises(ValueError, match=r"features that are numbers: .*'x'"):
        parse_citations(content.replace(b"\t1\t0\t", b"\tx\t0\t"), cites)
    with pytest.raises(ValueError, match="each paper once"):
        parse_citations(content + b"\npaper0\t0\t1\t0\tclass0", cites)
    with pytest.raises(ValueError, match="equally many features"):
        parse_citations(content + b"\npaper99\t0\tclass0", cites)


def test_bad_names_are_named():
    with pytest.raises(ValueError, match="name must be one of cora, cora_raw, citeseer, pubmed, got 'cifar10'"):
        load_graph("cifar10")
