"""What the step operations refuse: gradients, and tensors that a kernel would misread."""

import pytest
import torch
from check_op import copy, mixed_map, record
from torch import Tensor

import pydeq

SOLVERS = {
    "picard_step": pydeq.Picard(),
    "anderson_step": pydeq.Anderson(),
    "broyden_step": pydeq.Broyden(memory=2),
    "gmres_step": pydeq.GMRES(restart=4),
}
OPS = {name: getattr(torch.ops.pydeq, name).default for name in SOLVERS}


def one_sample(name, dtype=torch.float32):
    return copy(record(SOLVERS[name], *mixed_map(3, 5, dtype), 6)[2])


def argument_names(name):
    return [argument.name for argument in OPS[name]._schema.arguments]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("argument", ["z", "f"])
def test_refuses_gradients(name, argument):
    sample = list(one_sample(name))
    sample[argument_names(name).index(argument)].requires_grad_()
    step = getattr(pydeq.ops, name)
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable, but an input requires grad.*pydeq.DEQ"):
        step(*sample)
    sample[argument_names(name).index("z")] = sample[argument_names(name).index("z")].detach()
    with torch.no_grad():
        step(*sample)


@pytest.mark.kernels
@pytest.mark.parametrize("fault", ["dtype", "columns", "rows", "dimensions", "layout"])
@pytest.mark.parametrize("name", SOLVERS)
def test_refuses_what_it_would_misread(name, fault):
    arguments = [a.name for a in OPS[name]._schema.arguments if "Tensor" in str(a.type)]
    refused = [argument for argument in arguments if refuses(name, argument, fault)]
    # Vectors have no rows, and no layout of their own.
    vectors = ("progress", "lengths") if fault in ("rows", "layout") else ()
    assert refused == [a for a in arguments if a not in vectors]


def refuses(name, argument, fault):
    dtype = torch.bfloat16 if argument == "iterate" else torch.float32
    sample, names = list(one_sample(name, dtype)), argument_names(name)
    if argument == "restart":
        sample[names.index("restart")] = torch.zeros_like(sample[names.index("steps")][0])
    index = names.index(argument)
    given = sample[index][0] if isinstance(sample[index], list) else sample[index]
    spoiled = spoil(given, fault)
    if spoiled is None:
        return False
    sample[index] = [spoiled, *sample[index][1:]] if isinstance(sample[index], list) else spoiled
    # Of two that disagree it may name the other.
    named = {"z": "z|f|next", "thetas": "thetas|steps"}.get(argument, argument)
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"\b({named}) must "):
        OPS[name](*sample)
    return True


def spoil(x: Tensor, fault: str) -> Tensor | None:
    if fault == "dtype":
        return x.to(torch.int16)
    if fault == "dimensions":
        return x[None]
    if fault == "columns":
        return x[..., :-1].contiguous()
    if x.dim() == 1:
        return None
    if fault == "rows":
        return x.narrow(-2, 0, x.shape[-2] - 1).contiguous()
    return x.mT.contiguous().mT if x.mT.stride() != x.stride() else None
