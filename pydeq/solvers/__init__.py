"""The solvers: each computes the next iterate from the previous ones."""

from pydeq.solvers.anderson import Anderson
from pydeq.solvers.base import Solver
from pydeq.solvers.broyden import Broyden
from pydeq.solvers.custom import CustomSolver
from pydeq.solvers.gmres import GMRES
from pydeq.solvers.newton_krylov import NewtonKrylov
from pydeq.solvers.picard import Picard
from pydeq.solvers.trust_region import TrustRegion

__all__ = ["GMRES", "Anderson", "Broyden", "CustomSolver", "NewtonKrylov", "Picard", "Solver", "TrustRegion"]
