"""Operations: for each its schema, its reference in plain torch, its fake kernel, its gradient and its wrapper.

One operation per iteration does all of a solver's work. Compiled kernels, where they are loaded, replace the
references under the same schema.
"""

from pydeq.ops.anderson_step import anderson_step
from pydeq.ops.broyden_step import broyden_step
from pydeq.ops.gmres_step import gmres_step
from pydeq.ops.picard_step import picard_step
from pydeq.ops.random_probes import random_probes
from pydeq.ops.squared_norm import mean_squared_norm, squared_norm

from pydeq.ops import kernels  # isort: skip  # The kernels register themselves under schemas that must exist by now.

kernels.load()

__all__ = [
    "anderson_step",
    "broyden_step",
    "gmres_step",
    "mean_squared_norm",
    "picard_step",
    "random_probes",
    "squared_norm",
]
