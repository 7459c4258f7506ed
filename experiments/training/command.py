"""``python -m experiments train``: a training from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.training.checkpoint import CheckpointError
from experiments.training.config_files import describe_config, training_config_names
from experiments.training.configuration import load_training_config, parse_values
from experiments.training.progress import ProgressBar
from experiments.training.run import FolderInUseError, train


def run(arguments: argparse.Namespace) -> int:
    """Train as the arguments say.

    Without a configuration, list their names.

    Returns:
        The exit status: 0 if the training finished, 1 if it diverged or failed, 130 if it was interrupted.
    """
    if arguments.config is None:
        return _list()
    try:
        config = load_training_config(arguments.config, _values(arguments))
    except (TypeError, ValueError, OSError, ModuleNotFoundError) as error:
        return _failed(error)
    out = Path("runs", Path(arguments.config).stem) if arguments.out is None else Path(arguments.out)
    try:
        result = train(config, out=out, resume=arguments.resume, observers=[ProgressBar(out=out)])
    except KeyboardInterrupt:
        print(f"interrupted; continue with --resume --out {out}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (CheckpointError, FolderInUseError, ModuleNotFoundError, OSError, ValueError) as error:
        return _failed(error)
    return 0 if result.status == "finished" else 1


def _list() -> int:
    names = training_config_names()
    width = max(len(name) for name in names)
    print("python -m experiments train CONFIG, with a YAML or JSON file or one of these:\n")
    for name in names:
        print(f"  {name:{width}}  {describe_config(name)}")
    return 0


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    values = parse_values(arguments.values)
    for name in ("epochs", "steps", "device"):
        given = getattr(arguments, name)
        if given is not None:
            values[name] = given
    return values


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1
