"""A safe reader of pickles that hold only arrays, sparse matrices and collections.

A pickle is a program: with the standard reader it can call any function by its name. This reader has a table of the
names in the published files, and refuses every other name before looking it up.
"""

from __future__ import annotations

import collections
import io
import pickle
from typing import Any

import numpy as np


class CSRMatrix:
    """A pickled scipy.sparse.csr_matrix, read without scipy; :meth:`dense` checks its attributes."""

    data: Any
    indices: Any
    indptr: Any
    _shape: Any

    def dense(self, name: str) -> np.ndarray:
        """Return the dense matrix, float32.

        Args:
            name: Name of the file, for errors.

        Raises:
            ValueError: If it is not a valid sparse matrix.
        """
        try:
            data, indices, indptr = (numbers(getattr(self, part), name, 1) for part in ("data", "indices", "indptr"))
            rows, columns = (int(size) for size in self._shape)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} must hold a sparse matrix in CSR format: {error}") from error
        lengths = np.diff(indptr.astype(np.int64))
        whole = len(indptr) == rows + 1 and indptr[0] == 0 and indptr[-1] == len(indices) == len(data)
        if not whole or (lengths < 0).any():
            raise ValueError(f"{name} must hold a sparse matrix in CSR format: its rows' ends do not fit its entries")
        if len(indices) and not 0 <= indices.min() <= indices.max() < columns:
            raise ValueError(f"{name} must have columns in [0, {columns}), got {indices.min()} to {indices.max()}")
        matrix = np.zeros((rows, columns), np.float32)
        # Duplicate entries are added, as in scipy.
        np.add.at(matrix, (np.repeat(np.arange(rows), lengths), indices), data.astype(np.float32))
        return matrix


# The objects of the allowed names. Files from Python 2 name modules that have moved since.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("__builtin__", "list"): list,
    ("builtins", "list"): list,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ADMITTED[_module, "_reconstruct"] = np.empty(0).__reduce__()[0]  # pyright: ignore[reportIndexIssue]
for _module in ("scipy.sparse.csr", "scipy.sparse._csr"):
    _ADMITTED[_module, "csr_matrix"] = CSRMatrix


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}") from None


def read_pickle(content: bytes, name: str) -> Any:
    """Read a pickle of arrays, sparse matrices and collections.

    Args:
        content: Content of the file.
        name: Name of the file, for errors.

    Raises:
        ValueError: If it names anything else, or is not a pickle.
    """
    try:
        # Python 2 wrote the bytes of arrays as text; latin-1 converts it back.
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(
            f"{name} must be a pickle of nothing but numpy arrays, scipy's sparse matrices and collections: {error}"
        ) from error


def numbers(array: Any, name: str, dimensions: int) -> np.ndarray:
    """Return ``array`` if it is a numpy array of numbers.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim != dimensions:
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must hold an array of numbers of {dimensions} dimensions, got {got}")
    return array
