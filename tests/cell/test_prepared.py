"""A cell prepared for one call: which callables it hands out, and what it says it is."""

import torch
from torch import nn

import pydeq
from pydeq.cell.prepared import PreparedCell, module_of
from pydeq.cell.torch_compile import Compiler


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, z, x, scale=1.0):
        return scale * self.linear(z) + x


def prepared(cell, z0, **options):
    return PreparedCell(cell, z0, compiler=Compiler(), **options)


def z0():
    return torch.zeros(2, 3, dtype=torch.float64)


def test_a_plain_cell_is_called_directly():
    cell = Affine()
    one = prepared(cell, z0())
    assert one.call is cell
    assert one.for_penalty(differentiates_twice=True) is cell
    assert one.sharing_weights() is cell
    assert one.modules == (cell, cell.linear)
    assert repr(one) == "PreparedCell(Affine)"


def test_the_module_of_a_bound_method_is_found():
    cell = Affine()
    assert module_of(cell.forward) is cell
    assert module_of(lambda z: z) is None
    assert prepared(cell.forward, z0()).modules == (cell, cell.linear)


def test_states_and_keywords_are_converted_on_the_way_to_the_cell():
    state = {"a": z0(), "b": z0() + 1.0}

    def cell(z, x, scale):
        return {"a": scale * z["b"], "b": z["a"] + x}

    one = prepared(cell, state, keywords={"scale": 3.0})
    x = torch.full((2, 3), 0.5, dtype=torch.float64)
    a, b = one.call(one.z0, *one.adapter.context((x,)))
    assert torch.equal(a, torch.full_like(a, 3.0))
    assert torch.equal(b, torch.full_like(b, 0.5))
    assert repr(one) == "PreparedCell(function, structured state, keywords scale, in a scope)"


def test_calls_and_the_penalty_draw_the_same_random_numbers():
    cell = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    one = prepared(cell, z0(), freeze_rng=True)
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    first = one.call(z)
    torch.manual_seed(1)
    assert torch.equal(one.call(z), first)
    assert torch.equal(one.for_penalty(differentiates_twice=True)(z), first)
    assert "replayed random numbers" in repr(one)


def test_masks_stay_the_same_in_the_scope_of_one_cell_and_differ_between_two():
    cell = nn.Sequential(nn.Linear(3, 3), pydeq.nn.VariationalDropout(0.5)).double()
    z = torch.ones(64, 3, dtype=torch.float64)
    one, other = prepared(cell, z), prepared(cell, z)
    first = one.call(z)
    assert torch.equal(one.call(z), first)
    assert torch.equal(one.sharing_weights()(z), first)
    assert not torch.equal(other.call(z), first)


def test_the_penalty_gets_a_compiled_cell_without_the_compiler_where_it_differentiates_twice():
    cell = Affine()
    compiled = torch.compile(cell, backend="eager")
    one = prepared(compiled, z0())
    assert one.is_compiled
    assert one.for_penalty(differentiates_twice=True) is cell
    assert one.for_penalty(differentiates_twice=False) is one.call
