"""Losses: fixed-point correction and the Jacobian penalty."""

from pydeq.compat.torchdeq.loss.correction import fp_correction, register_weight_func
from pydeq.compat.torchdeq.loss.jacobian import jac_reg, power_method

__all__ = ["fp_correction", "jac_reg", "power_method", "register_weight_func"]
