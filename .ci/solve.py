"""A first solve with the installed pydeq, by every solver."""

import torch

import pydeq

for solver in (pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden(), pydeq.GMRES()):
    solution = pydeq.fixed_point(lambda z: 0.5 * torch.tanh(z) + 1, torch.zeros(4, 9), solver=solver)
    assert solution.converged.all(), solution
