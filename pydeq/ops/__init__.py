"""Operations: each has a schema, a reference in plain torch, a fake kernel, a gradient and a wrapper.

In each iteration, one operation does all of a solver's work. Compiled kernels, if they are loaded, replace the
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
