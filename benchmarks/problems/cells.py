"""Cells of trained models on real inputs, from the files in weights/, and their adjoint systems.

``python -m experiments export-cells`` trains the models and writes the files.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import pydeq
from benchmarks.problems.base import BATCH, Problem
from benchmarks.timing import Map
from pydeq.models import DEQTransformerConfig, IGNNConfig, MDEQConfig, Memory, config_from_mapping
from pydeq.models.ignn import IGNNCell, normalized_edges
from pydeq.models.mdeq import MDEQCell
from pydeq.models.transformer import DEQTransformerCell

WEIGHTS = Path(__file__).with_name("weights")
RTOLS = (1e-3, 1e-5)
HALF_RTOL = 1e-2  # rounding in bfloat16 moves f(z) by some 5e-3 ||f(z)||
UNEVEN = ("mdeq_penalty", "mdeq_plain", "transformer_post_penalty")
HALF = "transformer_post_penalty"
SOURCES = {
    MDEQConfig: "Bai, Koltun and Kolter, Multiscale Deep Equilibrium Models, NeurIPS 2020",
    DEQTransformerConfig: "Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019",
    IGNNConfig: "Gu et al., Implicit Graph Neural Networks, NeurIPS 2020",
}


@dataclass(frozen=True, eq=False)
class StoredCell:
    """A trained cell with its context for a batch: a map of one tensor, batch first.

    Args:
        name: Of the file.
        title: For readers.
        config: Of the model.
        cell: cell(z, *context) -> like z.
        context: Inputs of the cell besides the state, batch first where they belong to a sample.
        shapes: Shapes of the state's tensors, without the batch.
        facts: What was measured when the file was made.
    """

    name: str
    title: str
    config: Any
    cell: nn.Module
    context: tuple[Tensor, ...]
    shapes: tuple[tuple[int, ...], ...]
    facts: Mapping[str, float]

    def start(self) -> Tensor:
        """Zeros: [B, *shape], or [B, D] if the state is several tensors."""
        shape = self.shapes[0] if len(self.shapes) == 1 else (sum(math.prod(shape) for shape in self.shapes),)
        return self.context[0].new_zeros(len(self.context[0]), *shape)

    def __call__(self, z: Tensor) -> Tensor:
        if len(self.shapes) == 1:
            return self.cell(z, *self.context)
        parts = z.split([math.prod(shape) for shape in self.shapes], dim=1)
        state = tuple(part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True))
        return torch.cat([image.flatten(1) for image in self.cell(state, *self.context)], dim=1)

    def to(self, dtype: torch.dtype) -> StoredCell:
        """The same map in another dtype."""
        context = tuple(each.to(dtype) if each.is_floating_point() else each for each in self.context)
        return replace(self, cell=copy.deepcopy(self.cell).to(dtype), context=context)

    def on(self, device: torch.device) -> StoredCell:
        """The same map on another device."""
        context = tuple(each.to(device) for each in self.context)
        return replace(self, cell=copy.deepcopy(self.cell).to(device), context=context)


def names() -> list[str]:
    """The names of all files."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def load(name: str, uneven: bool = False) -> StoredCell:
    """Read a cell and its batch, in float32.

    Args:
        name: One of :func:`names`.
        uneven: Take 28 samples that need few evaluations and four that need many. By default the batch is the first
            samples of the test data.
    """
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return stored_cell(
            name, json.loads(file.metadata()["about"]), tensors, slice(BATCH * uneven, BATCH * (1 + uneven))
        )


def stored_cell(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: slice) -> StoredCell:
    """Build a cell from the content of a file, with the context of some of its samples."""
    config = config_from_mapping(about["model"])
    wide = {key: each.float() if each.is_floating_point() else each.long() for key, each in tensors.items()}
    weights = {key.removeprefix("cell."): each for key, each in wide.items() if key.startswith("cell.")}

    def loaded(cell: nn.Module) -> Any:
        cell.load_state_dict(weights)
        return cell.eval().requires_grad_(False)

    if isinstance(config, MDEQConfig):
        cell, injection = loaded(MDEQCell(config)), wide["injection"][rows]
        context = (injection,)
        height, width = injection.shape[2:]
        shapes = tuple((c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate(config.channels))
    elif isinstance(config, DEQTransformerConfig):
        cell, injection = loaded(DEQTransformerCell(config)), wide["table"][wide["tokens"][rows]]
        batch, length, width = injection.shape
        memory = Memory(injection.new_empty(batch, 0, config.d_model), injection.new_empty(batch, 0, width))
        context, shapes = cell.context(injection, memory), ((length, config.d_model),)
    else:  # a graph is one sample
        assert isinstance(config, IGNNConfig)
        cell, injection = loaded(IGNNCell()), wide["injection"]
        edges = torch.cat([wide["edges"], wide["edges"].flip(0)], dim=1)
        context = (injection, wide["weight"], *normalized_edges(edges, injection.shape[1], injection.dtype))
        shapes = (tuple(injection.shape[1:]),)
    return StoredCell(name, about["title"], config, cell, context, shapes, about.get("facts", {}))


def equations(stored: StoredCell) -> dict[str, Any]:
    """The fields ``formula``, ``constants`` and ``sample_axes`` of a problem; none for convolutions."""
    if isinstance(stored.config, IGNNConfig):
        injection, weight, sources, targets, values = stored.context
        nodes = injection.shape[1]
        graph = injection.new_zeros(nodes, nodes).index_put_((targets, sources), values, accumulate=True)
        constants = {"injection": injection, "weight": weight, "graph": graph}
        return {"formula": _graph, "constants": constants, "sample_axes": {"injection": 0}}
    if not isinstance(stored.config, DEQTransformerConfig):
        return {}
    injection, _, _, positions, mask = stored.context
    heads, length = stored.config.heads, injection.shape[1]
    assert isinstance(stored.cell, DEQTransformerCell)
    attention, feedforward = stored.cell.attention, stored.cell.feedforward
    first, second = (layer for layer in feedforward if isinstance(layer, nn.Linear))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    # positions holds r_d for d = length - 1 down to 0. Keys of the future are masked, whatever their r.
    relative = positions[:, (length - 1 - distance).clamp(max=length - 1)]
    constants = {
        "project": attention.qkv.weight.unflatten(0, (3, heads, -1)),
        "injection": injection.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4),
        "content": attention.content_bias, "position": attention.position_bias, "relative": relative, "mask": mask,
        "output": attention.output.weight.unflatten(1, (heads, -1)), "output_bias": attention.output.bias,
        "first": first.weight, "first_bias": first.bias, "second": second.weight, "second_bias": second.bias,
    }  # fmt: skip
    constants = {key: each.detach().contiguous() for key, each in constants.items()}
    formula = _pre_norm if stored.config.pre_norm else _post_norm
    return {"formula": formula, "constants": constants, "sample_axes": {"injection": 1}}


def _graph(xp: Any, z: Any, injection: Any, weight: Any, graph: Any) -> Any:
    return xp.clip(graph @ (z @ weight.T) + injection, 0)


def _layer_norm(xp: Any, x: Any) -> Any:
    x = x - xp.mean(x, -1)[..., None]
    return x / xp.sqrt(xp.mean(x * x, -1)[..., None] + 1e-5)


def _attention(
    xp: Any, z: Any, project: Any, injection: Any, content: Any, position: Any, relative: Any, mask: Any, output: Any,
    output_bias: Any,
) -> Any:  # fmt: skip
    q, k, v = xp.einsum("bld,khed->kbhle", z, project) + injection
    by_content = xp.einsum("bhie,bhje->bhij", q + content, k)
    by_distance = xp.einsum("bhie,hije->bhij", q + position, relative)
    scores = (by_content + by_distance) * q.shape[-1] ** -0.5 + mask
    weights = xp.exp(scores - xp.amax(scores, -1)[..., None])
    weights = weights / xp.sum(weights, -1)[..., None]
    return xp.einsum("bhij,bhje,dhe->bid", weights, v, output) + output_bias


def _feedforward(xp: Any, h: Any, first: Any, first_bias: Any, second: Any, second_bias: Any) -> Any:
    return h + xp.clip(h @ first.T + first_bias, 0) @ second.T + second_bias


def _post_norm(xp: Any, z: Any, first: Any, first_bias: Any, second: Any, second_bias: Any, **attention: Any) -> Any:
    h = _layer_norm(xp, z + _attention(xp, z, **attention))
    return _layer_norm(xp, _feedforward(xp, h, first, first_bias, second, second_bias))


def _pre_norm(xp: Any, z: Any, first: Any, first_bias: Any, second: Any, second_bias: Any, **attention: Any) -> Any:
    h = _layer_norm(xp, z + _attention(xp, _layer_norm(xp, z), **attention))
    return _feedforward(xp, h, first, first_bias, second, second_bias)


def forward_problem(name: str, rtol: float, uneven: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
    """z = cell(z, x) from z = 0; weights and x are rounded to ``dtype``."""
    stored = load(name, uneven).to(dtype)
    kind = "".join([".uneven" * uneven, ".bf16" * (dtype == torch.bfloat16)])
    what = "".join([", four hard samples" * uneven, ", bfloat16" * (dtype == torch.bfloat16)])
    return Problem(
        f"cell.{name}{kind}.rtol{rtol:g}", f"{stored.title}{what}", stored, stored.start(), stored.facts, "cell",
        SOURCES[type(stored.config)], rtol, exact=stored.to(torch.float64), on_device=stored.on, **equations(stored),
    )  # fmt: skip


def nodes_problem(name: str, rtol: float) -> Problem:
    """The equilibrium of a graph with the nodes as samples, which depend on each other."""
    graph = forward_problem(name, rtol)
    fn, exact, formula, on_device = graph.fn, graph.exact, graph.formula, graph.on_device
    assert exact is not None
    assert formula is not None
    assert on_device is not None

    def moved(device: torch.device) -> Map:
        there = on_device(device)
        return lambda z: there(z[None])[0]

    return replace(
        graph, key=f"cell.{name}.nodes.rtol{rtol:g}", title=f"{graph.title}, a node is a sample", coupled=True,
        z0=graph.z0[0], fn=lambda z: fn(z[None])[0], exact=lambda z: exact(z[None])[0], on_device=moved,
        formula=lambda xp, z, **constants: formula(xp, z[None], **constants)[0],
    )  # fmt: skip


@cache
def equilibrium(name: str) -> Tensor:
    """z* of a cell's batch, solved in float32 to 1e-6."""
    stored = load(name)
    return pydeq.fixed_point(stored, stored.start(), solver=pydeq.Anderson(memory=8), rtol=1e-6, max_steps=500).value


def adjoint_problem(name: str, rtol: float) -> Problem:
    """u = J^T u + v from u = 0, J the cell's Jacobian at z*, v standard normal."""
    stored, z = load(name), equilibrium(name)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return Problem(
        f"adjoint.{name}.rtol{rtol:g}", f"adjoint of {stored.title}", adjoint_map(stored, z, v), torch.zeros_like(z),
        stored.facts, "adjoint", SOURCES[type(stored.config)], rtol,
        exact=adjoint_map(stored.to(torch.float64), z.double(), v.double()),
        on_device=lambda device: adjoint_map(stored.on(device), z.to(device), v.to(device)),
    )  # fmt: skip


def adjoint_map(fn: Map, z: Tensor, v: Tensor) -> Map:
    """u -> J^T u + v, J the Jacobian of ``fn`` at ``z``."""
    z = z.detach().clone().requires_grad_()
    with torch.enable_grad():
        image = fn(z)

    def adjoint(u: Tensor) -> Tensor:
        return torch.autograd.grad(image, z, u, retain_graph=True)[0] + v

    return adjoint


def cells() -> list[Problem]:
    """The cells of all files at both tolerances, and some of them on other batches or in bfloat16."""
    found = [forward_problem(name, rtol) for name in names() for rtol in RTOLS]
    found += [forward_problem(name, 1e-5, uneven=True) for name in UNEVEN]
    found += [nodes_problem(name, 1e-5) for name in names() if name.startswith("ignn")]
    return [*found, forward_problem(HALF, HALF_RTOL, dtype=torch.bfloat16)]


def adjoints() -> list[Problem]:
    """The adjoint systems of all cells at both tolerances."""
    return [adjoint_problem(name, rtol) for name in names() for rtol in RTOLS]
