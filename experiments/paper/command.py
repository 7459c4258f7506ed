"""``python -m experiments reproduce``: the paper's experiments from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from experiments.paper.experiment import Trainings
    from experiments.paper.grid import Grid
    from experiments.paper.measurement import Training
    from experiments.paper.recipes import Recipes

NAMES = ("table1", "table2", "table3", "figure7", "figure8", "modes", "length", "inference")
PROFILE_NAMES = ("cpu", "cpu-long", "paper", "smoke")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument("names", nargs="+", choices=(*NAMES, "all"), metavar="NAME", help=(
        f"{', '.join(NAMES)}, or all: the tables and figures of the paper, its penalty in two modes, trainings of"
        " different length, and trained models with another solver and in milliseconds"
    ))  # fmt: skip
    command.add_argument("--profile", choices=PROFILE_NAMES, default="cpu", help=(
        "cpu: CIFAR-10 and Shakespeare at sizes that two cores train, the default; cpu-long: the same for many hours;"
        " paper: the published configurations, which take days on a GPU; smoke: seconds, to see that it works"
    ))  # fmt: skip
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for trainings and results, which experiments"
                         " of a profile share; runs/reproduce-PROFILE by default")  # fmt: skip
    command.add_argument(
        "--seeds", type=int, metavar="N", help="seeds of the main rows; cpu: 2, cpu-long: 3, else 1, by default"
    )
    command.add_argument("--resume", action="store_true", help="continue trainings that were interrupted")
    command.add_argument("--reuse", type=Path, action="append", default=[], metavar="DIR", help=(
        "a folder of another run, whose measurements are taken instead of training again; may be given several times"
    ))  # fmt: skip
    command.add_argument("--jobs", type=int, metavar="N", help=(
        "trainings at a time, each a process with one thread; by default as many as cores, at most 2, and on a GPU 1"
    ))  # fmt: skip
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    command.add_argument("--amp", choices=("none", "bf16"), default="none", help=(
        "precision of the image trainings of cpu-long: bf16 takes half the time on CPUs with AVX-512, and ten times as"
        " long on others; they are other trainings than those without it"
    ))  # fmt: skip
    command.add_argument("--imagenet", metavar="DIR", help="folder of ImageNet, for table2 of the paper profile")
    command.add_argument("--plan", action="store_true", help="list the trainings, and train nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run experiments.

    Returns:
        The exit status: 0; 1 if something could not be trained; 2 for invalid arguments; 130 after an interruption.
        Claims that are not shown are results, not errors.
    """
    from benchmarks.environment import cores
    from experiments.data import AlteredDataError, MissingDataError
    from experiments.paper import EXPERIMENTS, Grid, recipes_of

    for name in ("seeds", "jobs"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            return _failed(f"--{name} must be at least 1, got {getattr(arguments, name)}", 2)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _failed("--device must be cpu or auto: torch has no CUDA here, got cuda", 2)
    device = "cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu"
    try:
        recipes = recipes_of(arguments.profile, device, arguments.imagenet, arguments.amp)
    except ModuleNotFoundError as error:
        return _failed(str(error))
    except ValueError as error:
        return _failed(str(error), 2)
    seeds = arguments.seeds or recipes.seeds
    out = arguments.out or Path("runs", f"reproduce-{recipes.name}")
    jobs = arguments.jobs or (1 if device == "cuda" else min(2, cores()))
    names = NAMES if "all" in arguments.names else tuple(dict.fromkeys(arguments.names))
    wanted = {name: EXPERIMENTS[name].trainings(recipes, seeds) for name in names}
    for folder in arguments.reuse:
        if not (folder / "trainings").is_dir():
            return _failed(f"--reuse must be the folder of a run, which has a folder trainings, got {folder}", 2)
    grid = Grid(out, jobs, threads=1, resume=arguments.resume, reuse=arguments.reuse)
    try:
        if arguments.plan:
            return _plan(wanted, grid)
        if recipes.needs_gpu and device != "cuda":
            return _failed(
                "the paper profile trains the published models, which takes days on a GPU, and torch finds none here:"
                " use --profile cpu, or see the trainings with --plan"
            )
        out.mkdir(parents=True, exist_ok=True)
        failed = _measure(wanted, grid)
        for name in names:
            if len(grid.find(_flat(wanted[name]))) == len({each.key for each in _flat(wanted[name]).values()}):
                _reproduce(name, wanted[name], recipes, grid, device, seeds)
            else:
                print(f"{name}: not all of its trainings are measured\n", flush=True)
        if failed is not None:
            return _failed(failed)
    except KeyboardInterrupt:
        print(f"interrupted; continue with --resume --out {out}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (AlteredDataError, MissingDataError, FileExistsError, OSError, ValueError) as error:
        return _failed(str(error))
    return 0


def _measure(wanted: Mapping[str, Trainings], grid: Grid) -> str | None:
    """Measure the trainings of all experiments, side by side; return why some failed."""
    from experiments.paper import GridError

    every: dict[str, Training] = {}
    keys = set()
    for name, trainings in wanted.items():
        for label, each in _flat(trainings).items():
            if each.key not in keys:
                keys.add(each.key)
                every[f"{name}: {label}"] = each
    try:
        grid.measure(every)
    except GridError as error:
        return str(error)
    return None


def _reproduce(name: str, trainings: Trainings, recipes: Recipes, grid: Grid, device: str, seeds: int) -> None:
    """Run one experiment and write its files."""
    from experiments.paper import EXPERIMENTS
    from experiments.paper.environment import environment
    from experiments.paper.report import report_mapping
    from experiments.training.atomic_files import write_whole

    experiment = EXPERIMENTS[name]
    title = f"{name}, {recipes.name} profile: {experiment.title}"
    print(title, flush=True)
    measured = grid.measure(_flat(trainings))
    found = {label: [measured[each.key] for each in group] for label, group in trainings.items()}
    report = experiment.report(recipes, found)
    print(f"\n{report}\n")
    facts = {"experiment": name, "title": experiment.title, "profile": recipes.name, "seeds": seeds}
    mapping = report_mapping(report, facts | {"environment": environment(device)}, found)
    path = grid.out / f"reproduce-{recipes.name}-{name}.json"
    write_whole(path, json.dumps(mapping, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path}")
    try:
        from experiments.paper.figures import draw

        draw(report, title, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}\n", flush=True)
    except ModuleNotFoundError:
        print("no plot without matplotlib: pip install matplotlib\n", flush=True)


def _plan(wanted: Mapping[str, Trainings], grid: Grid) -> int:
    """List the trainings of experiments."""
    every = {each.key: (label, each) for trainings in wanted.values() for label, each in _flat(trainings).items()}
    found = grid.find(dict(every.values()))
    for name, trainings in wanted.items():
        print(name)
        for label, each in _flat(trainings).items():
            config = each.config
            length = f"{config.steps} steps" if config.steps is not None else f"{config.epochs} epochs"
            state = "measured" if each.key in found else "begun" if grid.folder(each).is_dir() else "to do"
            precision = "" if config.amp == "none" else f", {config.amp}"
            print(f"  {each.key}  {label}: {type(config.model).__name__.removesuffix('Config')} on {config.data.name},"
                  f" {length}, cap {config.max_steps}{precision}; {state}")  # fmt: skip
    print(f"{len(every)} different trainings, {len(found)} of them measured in {grid.out}")
    return 0


def _flat(trainings: Trainings) -> dict[str, Training]:
    """Give each training its own label."""
    return {f"{label}, seed {each.config.seed}": each for label, group in trainings.items() for each in group}


def _failed(text: str, status: int = 1) -> int:
    print(f"error: {text}", file=sys.stderr)
    return status
