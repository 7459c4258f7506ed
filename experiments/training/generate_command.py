"""``python -m experiments generate``: text from a trained language model."""

from __future__ import annotations

import argparse
import sys
import warnings

import torch

from experiments.training.checkpoint import CheckpointError
from experiments.training.run_folder import load_run
from pydeq.models import DEQTransformerLM
from pydeq.solution import ConvergenceWarning


def run(arguments: argparse.Namespace) -> int:
    """Print a prompt and its continuation.

    Returns:
        The exit status: 0; 1 if there is no such model, or an argument is not valid.
    """
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device must be cpu: torch has no CUDA here, got cuda")
        found = load_run(arguments.run_folder, arguments.checkpoint)
        model = found.model
        if not isinstance(model, DEQTransformerLM):
            raise ValueError(f"RUN must have a language model, got {arguments.run_folder} with {type(model).__name__}")
        device = torch.device(arguments.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the cap of the training holds here, too
            text = model.to(device).generate(
                arguments.prompt, arguments.tokens, arguments.temperature, arguments.top_k,
                generator=torch.Generator(device).manual_seed(arguments.seed),
            )  # fmt: skip
    except (CheckpointError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0
