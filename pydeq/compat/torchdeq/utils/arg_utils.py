"""Command-line arguments."""

from __future__ import annotations

import argparse
from typing import Any

# name -> keywords of add_argument
ARGUMENTS: dict[str, dict[str, Any]] = {
    "f_solver": {"default": "fixed_point_iter", "type": str, "help": "forward solver"},
    "b_solver": {"default": "fixed_point_iter", "type": str, "help": "backward solver"},
    "f_max_iter": {"type": int, "default": 40, "help": "maximum number of evaluations of the forward solver"},
    "b_max_iter": {"type": int, "default": 40, "help": "maximum number of evaluations of the backward solver"},
    "f_tol": {"type": float, "default": 1e-3, "help": "tolerance of the forward solver"},
    "b_tol": {"type": float, "default": 1e-6, "help": "tolerance of the backward solver"},
    "f_stop_mode": {"type": str, "default": "abs", "help": "forward residual: abs or rel"},
    "b_stop_mode": {"type": str, "default": "abs", "help": "backward residual: abs or rel"},
    "eval_factor": {"type": float, "default": 1.0, "help": "factor of f_max_iter in evaluation mode"},
    "eval_f_max_iter": {"type": int, "default": 0, "help": "f_max_iter in evaluation mode, if above 0"},
    "norm_type": {"default": "weight_norm", "type": str, "help": "none, weight_norm or spectral_norm"},
    "norm_no_scale": {"action": "store_true", "help": "do not learn the target norm"},
    "norm_clip": {"action": "store_true", "help": "bound target norm / norm by norm_clip_value"},
    "norm_clip_value": {"default": 1.0, "type": float, "help": "the bound of norm_clip"},
    "norm_target_norm": {"default": 1.0, "type": float, "help": "the target norm, if it is not learned"},
    "sn_n_power_iters": {"default": 1, "type": int, "help": "power iterations of the spectral norm"},
    "core": {"default": "sliced", "type": str, "help": "how states are sampled: indexing or sliced"},
    "ift": {"action": "store_true", "help": "differentiate implicitly"},
    "hook_ift": {"action": "store_true", "help": "the same"},
    "n_states": {"type": int, "default": 1, "help": "states sampled uniformly"},
    "indexing": {"type": int, "nargs": "+", "default": [], "help": "steps whose states are sampled"},
    "gamma": {"type": float, "default": 0.8, "help": "strength of the fixed-point correction"},
    "grad": {"type": int, "nargs": "+", "default": [1], "help": "steps of the phantom gradient"},
    "tau": {"type": float, "default": 1.0, "help": "damping of the phantom gradient"},
    "sup_gap": {"type": int, "default": -1, "help": "sample the phantom gradient once per this number of steps"},
    "sup_loc": {"type": int, "nargs": "+", "default": [], "help": "sample these steps of the phantom gradient"},
    "jac_loss_weight": {"type": float, "default": 0.0, "help": "weight of the Jacobian penalty"},
    "jac_loss_freq": {"type": float, "default": 0.0, "help": "share of the steps with Jacobian penalty"},
    "jac_incremental": {"type": int, "default": 0, "help": "steps between increases of the penalty's weight by 0.1"},
    "sradius_mode": {"action": "store_true", "help": "estimate the spectral radius in validation"},
}


def add_deq_args(parser: argparse.ArgumentParser) -> None:
    """Add every option of :func:`get_deq` and :func:`apply_norm` to a parser.

    Examples:
        >>> import argparse
        >>> import pydeq.compat.torchdeq as torchdeq
        >>> parser = argparse.ArgumentParser()
        >>> torchdeq.add_deq_args(parser)
        >>> parser.parse_args(["--f_max_iter", "30"]).f_max_iter
        30
    """
    for name, options in ARGUMENTS.items():
        parser.add_argument(f"--{name}", **options)
