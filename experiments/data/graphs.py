"""Citation graphs with labelled nodes, for models such as :class:`pydeq.models.IGNN`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.data.cache import read_files
from experiments.data.catalogue import data_set
from experiments.data.pickles import CSRMatrix, numbers, read_pickle
from experiments.data.sampling import permutation

VALID, TEST = 500, 1000
"""Numbers of nodes for validation and test in Planetoid's split and similar ones."""

PER_CLASS = 20
"""Number of training nodes of each class in a split like Planetoid's."""


@dataclass(frozen=True, repr=False)
class Graph:
    """A graph whose nodes have features and labels.

    Args:
        features: float32, (nodes, features).
        labels: int64, (nodes,), in [0, classes); -1 for nodes without a label.
        edges: Pairs (from, to), int64, (2, edges), sorted, each edge in both directions, without duplicates and loops.
            This is the format of :class:`pydeq.models.IGNN`, which adds the loops.
        train: Mask of the nodes for training, bool, (nodes,).
        valid: Mask of the nodes for validation.
        test: Mask of the nodes for the test.
        classes: Number of classes.
    """

    features: Tensor
    labels: Tensor
    edges: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        split = ", ".join(f"{name} {int(getattr(self, name).sum())}" for name in ("train", "valid", "test"))
        features = self.features.shape[1]
        return (
            f"Graph({len(self)} nodes with {features} features, {self.edges.shape[1]} edges, {self.classes} classes;"
            f" {split})"
        )

    def row_normalized(self) -> Graph:
        """Return the graph with features scaled to the sum 1 at each node (Kipf and Welling, ICLR 2017); zeros stay."""
        sums = self.features.sum(dim=1, keepdim=True)
        return dataclasses.replace(self, features=self.features / torch.where(sums == 0, torch.ones_like(sums), sums))

    def adjacency(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return D^(-1/2) (E + I) D^(-1/2) as a sparse COO tensor, (nodes, nodes); row i has the edges to node i."""
        from pydeq.models.ignn import normalized_edges

        sources, targets, weights = normalized_edges(self.edges, len(self), dtype)
        size = (len(self), len(self))
        return torch.sparse_coo_tensor(torch.stack([targets, sources]), weights, size, check_invariants=True).coalesce()


def load_graph(name: str, root: str | os.PathLike[str] | None = None) -> Graph:
    """Read a citation graph.

    cora, citeseer, pubmed: Planetoid's files and its split (Yang, Cohen and Salakhutdinov, ICML 2016): 20 nodes of each
    class for training, 500 for validation, 1000 for the test. CiteSeer has 15 papers without features and labels, which
    are in no mask.

    cora_raw: the files that Planetoid's Cora was made from, with another split of the same sizes. Results on it are not
    comparable to those on Planetoid's split.

    Args:
        name: "cora", "citeseer", "pubmed" or "cora_raw".
        root: Folder of the files, or of the data sets' folders; see :func:`experiments.data.data_root`.

    Raises:
        ValueError: If the name is unknown, or a file is not the published one (AlteredDataError). The files are
            pickles: each is opened only after its sha256 was compared.
        MissingDataError: If a file is missing (a FileNotFoundError).
    """
    data = data_set(name, "graph")
    contents = read_files(data, [file.name for file in data.files], root)
    if name == "cora_raw":
        return parse_citations(contents["cora.content"], contents["cora.cites"])
    return parse_planetoid(contents, name)


def parse_planetoid(contents: Mapping[str, bytes], name: str) -> Graph:
    """Build the graph in Planetoid's files.

    ``allx`` and ``ally`` are the features and one-hot labels of the first nodes; the first ``len(y)`` nodes are for
    training. ``tx`` and ``ty`` are features and labels of the nodes in ``test.index``, in its order. ``graph`` maps
    nodes to their neighbours.

    Args:
        contents: Contents of the files ind.<name>.*, by name.
        name: Name of the data set.

    Raises:
        ValueError: If a file holds something else, or the files do not fit together.
    """

    def features(part: str) -> np.ndarray:
        found = read_pickle(contents[f"ind.{name}.{part}"], f"ind.{name}.{part}")
        if not isinstance(found, CSRMatrix):
            raise ValueError(f"ind.{name}.{part} must hold a sparse matrix in CSR format, got {type(found).__name__}")
        return found.dense(f"ind.{name}.{part}")

    def labels(part: str) -> np.ndarray:
        return numbers(read_pickle(contents[f"ind.{name}.{part}"], f"ind.{name}.{part}"), f"ind.{name}.{part}", 2)

    allx, tx, y, ally, ty = features("allx"), features("tx"), labels("y"), labels("ally"), labels("ty")
    if len(allx) != len(ally) or len(tx) != len(ty) or len(y) > len(ally):
        raise ValueError(
            f"ind.{name}: allx and ally, tx and ty must have equally many rows, and y no more than ally, got "
            f"{len(allx)} and {len(ally)}, {len(tx)} and {len(ty)}, {len(y)}"
        )
    if allx.shape[1] != tx.shape[1] or not y.shape[1] == ally.shape[1] == ty.shape[1]:
        raise ValueError(f"ind.{name}: all features, and all labels, must have equally many columns")
    try:
        test = np.array([int(line) for line in contents[f"ind.{name}.test.index"].split()], np.int64)
    except ValueError as error:
        raise ValueError(f"ind.{name}.test.index must be whole numbers, one a line: {error}") from error
    if len(test) != len(tx) or len(np.unique(test)) != len(test) or not len(test) or test.min() < len(allx):
        raise ValueError(
            f"ind.{name}.test.index must name {len(tx)} nodes, the rows of tx, each once and none below {len(allx)}"
        )

    nodes = int(test.max()) + 1
    x = np.zeros((nodes, allx.shape[1]), np.float32)
    x[: len(allx)], x[test] = allx, tx
    onehot = np.zeros((nodes, ally.shape[1]))
    onehot[: len(ally)], onehot[test] = ally, ty
    if not np.isin(onehot, (0, 1)).all() or (onehot.sum(axis=1) > 1).any():
        raise ValueError(f"ind.{name}: labels must be one-hot, with at most one 1 in a row")

    graph = read_pickle(contents[f"ind.{name}.graph"], f"ind.{name}.graph")
    if not isinstance(graph, dict) or not all(isinstance(ends, list) for ends in graph.values()):
        raise ValueError(f"ind.{name}.graph must hold a mapping of nodes to lists of nodes")
    pairs = np.array([(node, end) for node, ends in graph.items() for end in ends], dtype=object).reshape(-1, 2)
    return Graph(
        torch.from_numpy(x),
        torch.from_numpy(np.where(onehot.any(axis=1), onehot.argmax(axis=1), -1)),
        _edges(pairs, nodes, f"ind.{name}.graph"),
        train=_mask(nodes, np.arange(len(y))),
        valid=_mask(nodes, np.arange(len(y), min(len(y) + VALID, len(ally)))),
        test=_mask(nodes, test),
        classes=ally.shape[1],
    )


def parse_citations(content: bytes, cites: bytes) -> Graph:
    """Build the graph in Cora's original files, with a fixed random split.

    Args:
        content: Lines with a paper's name, its binary features and its class.
        cites: Lines with the names of a paper and of a paper that cites it.

    Raises:
        ValueError: If a line has another format, or there are too few papers for the split.
    """
    rows = [line.split() for line in content.decode("ascii").splitlines()]
    if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < 3:
        raise ValueError("cora.content must have lines of a name, equally many features, and a class")
    number = {row[0]: i for i, row in enumerate(rows)}
    if len(number) != len(rows):
        raise ValueError("cora.content must name each paper once")
    names = sorted({row[-1] for row in rows})
    labels = np.array([names.index(row[-1]) for row in rows], np.int64)
    cited = [line.split() for line in cites.decode("ascii").splitlines()]
    if not all(len(papers) == 2 for papers in cited):
        raise ValueError("cora.cites must have lines of two papers' names")
    try:
        pairs = np.array([[number[paper] for paper in papers] for papers in cited], np.int64).reshape(-1, 2)
        features = np.array([row[1:-1] for row in rows]).astype(np.float32)
    except KeyError as error:
        raise ValueError(f"cora.cites must name papers of cora.content, got {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"cora.content must have features that are numbers: {error}") from error

    # In a random order that never changes: the first nodes of each class for training, then the other nodes.
    order = permutation(len(rows), seed=0, epoch=0).numpy()
    train = np.concatenate([order[labels[order] == label][:PER_CLASS] for label in range(len(names))])
    rest = order[~np.isin(order, train)]
    if len(train) != PER_CLASS * len(names) or len(rest) < VALID + TEST:
        raise ValueError(
            f"cora.content must have {PER_CLASS} papers of each of {len(names)} classes and {VALID + TEST} more"
        )
    return Graph(
        torch.from_numpy(features),
        torch.from_numpy(labels),
        _edges(pairs, len(rows), "cora.cites"),
        train=_mask(len(rows), train),
        valid=_mask(len(rows), rest[:VALID]),
        test=_mask(len(rows), rest[VALID : VALID + TEST]),
        classes=len(names),
    )


def _edges(pairs: np.ndarray, nodes: int, name: str) -> Tensor:
    """Make sorted edges in both directions, without duplicates and loops, (2, edges), from pairs of nodes, (N, 2)."""
    if not all(isinstance(node, int | np.integer) and 0 <= node < nodes for node in pairs.flat):
        raise ValueError(f"{name} must name pairs of nodes in [0, {nodes})")
    pairs = pairs.astype(np.int64)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = np.unique(both[both[:, 0] != both[:, 1]], axis=0)
    return torch.from_numpy(np.ascontiguousarray(both.T))


def _mask(nodes: int, chosen: np.ndarray) -> Tensor:
    mask = torch.zeros(nodes, dtype=torch.bool, device="cpu")
    mask[torch.from_numpy(chosen)] = True
    return mask
