"""``python -m experiments export-cells``: train small models, and keep their cells and inputs as benchmark problems.

Everything that a benchmark needs is in one file for each model: the cell's weights, inputs of the cell from test data,
and how well the model learned. The format is read by :mod:`benchmarks.problems.cells`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pydeq
from benchmarks.problems.base import BATCH
from benchmarks.problems.cells import WEIGHTS, StoredCell, stored_cell
from experiments import data
from experiments.training import TrainingConfig, load_training_config, train
from experiments.training.progress import ProgressBar
from pydeq.models import IGNN, MDEQ, DEQTransformerLM, EquilibriumModel, build

POOL = 512  # test samples that the uneven batch is chosen from
HARD = 4
NODES = 1024  # of a graph
LENGTH = 64


@dataclass(frozen=True)
class Recipe:
    """A training: a configuration's name and other values for some of its fields."""

    title: str
    config: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> TrainingConfig:
        return load_training_config(self.config, self.values)

    @property
    def command(self) -> str:
        """The command that trains it."""
        values = (f"--set {key}={json.dumps(value, separators=(',', ':'))}" for key, value in self.values.items())
        return " ".join(["python -m experiments train", self.config, *values])


_MDEQ = {
    "data.name": "cifar10", "data.train_samples": 20000, "data.test_samples": 1000, "model.image_channels": 3,
    "model.channels": [16, 32], "model.downsamplings": 1, "evaluation.every_steps": 1000,
    "evaluation.every_epochs": None, "evaluation.stops": [4],
}  # fmt: skip
_TRANSFORMER = {
    "model.d_model": 64, "model.d_inner": 128, "model.d_head": 16, "model.memory_length": 0, "model.vocabulary": 96,
    "evaluation.every_steps": 1000, "evaluation.stops": [6],
}  # fmt: skip
_PLAIN = {"penalty.strength": 0.0, "jitter": [0, 0]}
_LONG = {"model.solver.max_steps": 20, "model.solver.backward_max_steps": 16}
_PRE = {"model.pre_norm": True}
RECIPES = {
    "mdeq_penalty": Recipe(
        "MDEQ on CIFAR-10, with penalty", "mdeq_digits", _MDEQ | {"penalty.frequency": 0.3, "steps": 500}
    ),
    "mdeq_plain": Recipe(
        "MDEQ on CIFAR-10, no penalty", "mdeq_digits",
        _MDEQ | _PLAIN | {"model.solver.max_steps": 12, "model.solver.backward_max_steps": 10, "steps": 400},
    ),
    "transformer_post_penalty": Recipe(
        "post-LN transformer, with penalty", "transformer_shakespeare_small", _TRANSFORMER | {"steps": 900}
    ),
    "transformer_pre_penalty": Recipe(
        "pre-LN transformer, with penalty", "transformer_shakespeare_small", _TRANSFORMER | _PRE | {"steps": 900}
    ),
    "transformer_post_plain": Recipe(
        "post-LN transformer, no penalty", "transformer_shakespeare_small",
        _TRANSFORMER | _PLAIN | _LONG | {"steps": 700},
    ),
    "transformer_pre_plain": Recipe(
        "pre-LN transformer, no penalty", "transformer_shakespeare_small",
        _TRANSFORMER | _PLAIN | _PRE | _LONG | {"steps": 700},
    ),
    "ignn_cora": Recipe(
        "IGNN on Cora", "ignn_cora", {"data.name": "cora_raw", "evaluation.every_steps": 100}
    ),
    "ignn_pubmed": Recipe(
        "IGNN on PubMed", "ignn_cora",
        {"data.name": "pubmed", "model.inputs": 500, "model.outputs": 3, "model.hidden": 16, "model.bound": 0.99,
         "evaluation.every_steps": 100, "steps": 100},
    ),
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Export the cells that are asked for.

    Returns:
        The exit status: 0; 1 if a training failed; 2 for an unknown name.
    """
    unknown = [name for name in arguments.names if name not in RECIPES]
    if unknown:
        print(f"error: unknown cell {', '.join(unknown)}; there are {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    out = arguments.out or WEIGHTS
    out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or RECIPES:
        try:
            model, result = trained(RECIPES[name], arguments.runs / name)
        except (OSError, ValueError, RuntimeError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        about, tensors = export(name, model, result)
        path = out / f"{name}.safetensors"
        _save(path, about, tensors)
        facts = ", ".join(f"{key} {value:.4g}" for key, value in about["facts"].items())
        print(f"{path}: {path.stat().st_size} bytes; {facts}", flush=True)
    return 0


def trained(recipe: Recipe, out: Path) -> tuple[EquilibriumModel, dict[str, Any]]:
    """Train by a recipe, or read what was trained by it before: the model and the content of result.json.

    Raises:
        ValueError: If the folder has another training, or the training diverged.
    """
    from safetensors.torch import load_file

    config = recipe.load()
    if not (out / "result.json").exists():
        train(config, out=out, resume=out.exists(), observers=[ProgressBar()])
    if json.loads((out / "config.json").read_text()) != config.mapping():
        raise ValueError(f"{out} has a training with another configuration: remove it, or choose another folder")
    result = json.loads((out / "result.json").read_text())
    if result["status"] != "finished":
        raise ValueError(f"the training in {out} has {result['status']}")
    model = build(config.model)
    model.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    return model.eval().requires_grad_(False), result


def export(name: str, model: EquilibriumModel, result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Make the content of a file: its description and its tensors."""
    recipe = RECIPES[name]
    config = recipe.load()
    about: dict[str, Any] = {
        "title": recipe.title, "model": config.mapping()["model"], "data": config.data.name, "command": recipe.command
    }  # fmt: skip
    tensors, chance = pieces(model, config)
    if "weight_norm" in about["model"]:
        about["model"]["weight_norm"] = False  # the stored weights are the normalized ones
    tensors = {key: each.half() if each.is_floating_point() else each for key, each in tensors.items()}
    for key in ("injection", "tokens"):
        if key in tensors and len(tensors[key]) > 1:
            rows = torch.cat([torch.arange(BATCH), uneven_rows(name, about, tensors, len(tensors[key]))])
            tensors[key] = tensors[key][rows]
    metric = result["metric"]
    about["facts"] = {metric: result["test"]["metric"], "chance": chance}
    about["facts"] |= measured(stored_cell(name, about, tensors, slice(BATCH)))
    return about, {key: each.contiguous() for key, each in tensors.items()}


def pieces(model: EquilibriumModel, config: TrainingConfig) -> tuple[dict[str, Tensor], float]:
    """The cell's weights and inputs, and the metric of a model that knows nothing but the number of classes."""
    cell = model.deq.cell
    assert isinstance(cell, nn.Module)
    for module in cell.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    weights = {f"cell.{key}": each for key, each in cell.state_dict().items()}
    if isinstance(model, MDEQ):
        known = data.statistics(config.data.name)
        images = data.load_images(config.data.name, "test").images[:POOL]
        injection = model.stem(data.normalize(images, known.mean, known.std))
        return weights | {"injection": injection}, 0.1
    if isinstance(model, DEQTransformerLM):
        text = data.load_text(config.data.name, level="char")
        tokens = text.test[: POOL * LENGTH].view(POOL, LENGTH)
        table = model.injection(model.embedding(torch.arange(model.config.vocabulary)[None]))[0]
        return weights | {"table": table, "tokens": tokens.to(torch.uint8)}, float(text.vocabulary.size)
    assert isinstance(model, IGNN)
    graph = data.load_graph(config.data.name)
    graph = graph.row_normalized() if config.data.row_normalized else graph
    nodes, edges = neighbourhood(graph.edges, len(graph.features), NODES)
    captured: list[tuple[Tensor, ...]] = []
    handle = model.deq.register_forward_pre_hook(lambda _, arguments: captured.append(arguments))
    model(graph.features[nodes], edges, max_steps=1)
    handle.remove()
    _, injection, weight, *_ = captured[0]
    once = edges[:, edges[0] < edges[1]].to(torch.int16)
    return {"injection": injection, "weight": weight, "edges": once}, 1.0 / graph.classes


def neighbourhood(edges: Tensor, nodes: int, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` nodes that a search in breadth from the node of highest degree finds first, and their edges.

    Returns:
        The nodes in order, and the edges between them by their places in it.
    """
    neighbours: list[list[int]] = [[] for _ in range(nodes)]
    for begin, end in edges.T.tolist():
        neighbours[begin].append(end)
    start = max(range(nodes), key=lambda node: len(neighbours[node]))
    found, seen = [start], {start}
    for node in found:
        new = [each for each in neighbours[node] if each not in seen]
        seen.update(new)
        found += new
        if len(found) >= count:
            break
    chosen = torch.tensor(sorted(found[:count]))
    place = torch.full((nodes,), -1)
    place[chosen] = torch.arange(len(chosen))
    places = place[edges]
    return chosen, places[:, (places >= 0).all(0)]


def uneven_rows(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int) -> Tensor:
    """Rows of a batch with few hard samples, in random order: by the evaluations that Anderson needs.

    A sample that is not solved is not chosen.
    """
    spent = []
    for begin in range(0, count, BATCH):
        stored = stored_cell(name, about, tensors, slice(begin, begin + BATCH))
        solution = pydeq.fixed_point(stored, stored.start(), rtol=1e-5, max_steps=200)
        spent.append(torch.where(solution.converged, solution.sample_nfe, -1))
    order = torch.cat(spent).argsort(stable=True)
    order = order[torch.cat(spent)[order] >= 0]
    rows = torch.cat([order[: BATCH - HARD], order[len(order) - HARD :]])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def measured(stored: StoredCell) -> dict[str, float]:
    """The cell's spectral radius at z* and the residual that z* has, the largest of the batch."""
    exact = stored.to(torch.float64)
    solution = pydeq.fixed_point(exact, exact.start(), solver=pydeq.Anderson(memory=8), rtol=1e-9, max_steps=1000)
    radius = pydeq.spectral_radius(
        exact, solution.value, steps=60, method="arnoldi", generator=torch.Generator().manual_seed(0)
    )
    return {
        "spectral_radius": radius.max().item(),
        "spectral_radius_mean": radius.mean().item(),
        "residual": solution.relative_residual.max().item(),
    }


def _save(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, {"about": json.dumps(about)})
