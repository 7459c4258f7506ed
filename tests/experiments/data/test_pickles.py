import collections
import functools
import os
import pickle

import numpy as np
import pytest
from formats import python2_pickle
from scipy import sparse

from experiments.data.pickles import CSRMatrix, read_pickle


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_what_calls_anything_is_refused_and_not_called(tmp_path, protocol):
    marker = tmp_path / "called"
    attacks = [
        Calls(os.mkdir, str(marker)),
        Calls(eval, f"__import__('os').mkdir({str(marker)!r})"),
        Calls(functools.reduce, max, [1, 2]),
        [1, {"deep": Calls(os.system, f"mkdir {marker}")}],
        collections.defaultdict(functools.partial(os.mkdir, str(marker))),
        Calls(np.load, str(marker)),
        os.path.join,
        Calls(getattr, "text", "upper"),
    ]
    for attack in attacks:
        content = pickle.dumps(attack, protocol)
        with pytest.raises(ValueError, match=r"ind\.cora\.x must be a pickle of nothing but .*: it names "):
            read_pickle(content, "ind.cora.x")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", b"cnumpy\nndarray\n)R.", b"not a pickle", b"\x80\x02]q\x00K\x01b."]
)
def test_what_is_no_pickle_is_refused(content):
    with pytest.raises(ValueError, match="graph must be a pickle"):
        read_pickle(content, "graph")


def test_dotted_names_do_not_reach_further():
    # Protocol 4 looks up attributes of attributes by dotted names.
    content = b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93."
    with pytest.raises(ValueError, match=r"it names numpy\.ndarray\.__init__"):
        read_pickle(content, "x")


def test_arrays_matrices_and_collections_are_read():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert np.array_equal(read_pickle(python2_pickle(array), "x"), array)
    graph = collections.defaultdict(list, {0: [1, 2], 1: [0]})
    assert read_pickle(python2_pickle(graph), "graph") == graph
    matrix = sparse.random(7, 5, density=0.4, format="csr", dtype=np.float32, random_state=np.random.default_rng(0))
    for content in (python2_pickle(matrix), pickle.dumps(matrix, 4)):
        found = read_pickle(content, "x")
        assert isinstance(found, CSRMatrix)
        assert np.array_equal(found.dense("x"), matrix.toarray())


def test_the_published_names_are_those_of_python_2():
    content = python2_pickle(sparse.csr_matrix(np.eye(2)))
    assert b"scipy.sparse.csr\ncsr_matrix" in content
    assert b"numpy.core.multiarray\n_reconstruct" in content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([0, 9], np.int32)}, r"columns in \[0, 3\), got 0 to 9"),
        ({"indices": np.array([-1, 0], np.int32)}, r"columns in \[0, 3\), got -1 to 0"),
        ({"indptr": np.array([0, 1], np.int32)}, "ends do not fit"),
        ({"indptr": np.array([0, 3, 2], np.int32)}, "ends do not fit"),
        ({"indptr": np.array([1, 1, 2], np.int32)}, "ends do not fit"),
        ({"indptr": np.array([0, 1, 1], np.int32)}, "ends do not fit"),
        ({"data": np.array(["a", "b"], object)}, "array of numbers"),
        ({"data": [1, 2]}, "array of numbers of 1 dimensions, got list"),
        ({"data": np.ones((2, 1))}, "array of numbers"),
        ({"_shape": "ab"}, "CSR format"),
        ({"_shape": (2,)}, "CSR format"),
        ({"_shape": None}, "CSR format"),
    ],
)
def test_matrices_that_do_not_hold_together_are_refused(change, message):
    matrix = CSRMatrix()
    vars(matrix).update(
        data=np.ones(2), indices=np.array([0, 2], np.int32), indptr=np.array([0, 1, 2], np.int32), _shape=(2, 3)
    )
    assert matrix.dense("x").sum() == 2
    vars(matrix).update(change)
    with pytest.raises(ValueError, match=f"^x must .*{message}"):
        matrix.dense("x")
