"""Compiled solves against solves in Python of the same map. Compiling takes ten seconds, so tests share it."""

import copy
import functools
import itertools
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

import pydeq
from pydeq.cell import ahead_of_time
from pydeq.ops import kernels

pytestmark = pytest.mark.skipif(not pydeq.kernels().cpu, reason=pydeq.kernels().cpu_reason)

SOLVERS = [
    pydeq.Picard(),
    pydeq.Picard(damping=0.5),
    pydeq.Anderson(),
    pydeq.Anderson(memory=1),
    pydeq.Anderson(memory=8, damping=0.7, ridge=1e-9),
    pydeq.Broyden(),
    pydeq.Broyden(memory=2),
]


def same(found, expected, rtol=1e-10):
    """Both solutions tell the same, up to rounding."""
    assert found.nfe == expected.nfe
    assert found.statuses == expected.statuses
    assert found.sample_nfe.tolist() == expected.sample_nfe.tolist()
    for name in ("value", "image"):
        pairs = zip(*(tree_leaves(getattr(each, name)) for each in (found, expected)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, equal_nan=True)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-4, atol=0.1 * rtol, equal_nan=True)


# --- The same solves as in Python ------------------------------------------------------------------------------------


def layer(z, x, gain):
    """Contracts for a gain below 1; entries below -20 have no image."""
    weight = torch.linspace(-0.3, 0.3, 49, dtype=z.dtype).reshape(7, 7)
    return gain * torch.tanh(z @ weight.T) + x + 0.0 * torch.sqrt(z + 20.0)


@pytest.fixture(scope="module")
def compiled_layer():
    z0, x, gain = torch.zeros(5, 7).double(), torch.zeros(5, 7).double(), torch.ones(5, 1).double()
    return pydeq.CompiledSolve(layer, z0, x, gain)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("seed", range(4))
def test_solves_as_in_python(compiled_layer, solver, seed):
    generator = torch.Generator().manual_seed(seed)
    z0, x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    gain = torch.rand(5, 1, generator=generator, dtype=torch.float64) * 0.9
    options = {"solver": solver, "rtol": 10.0 ** -(2 + 3 * seed), "max_steps": (60, 7, 33, 2)[seed]}
    found = compiled_layer.replace(**options)(z0, x, gain)
    same(found, pydeq.fixed_point(layer, z0, x, gain, **options))
    # The value has the residual that the solution tells.
    torch.testing.assert_close(
        (layer(found.value, x, gain) - found.value).norm(dim=1), found.residual, rtol=1e-3, atol=1e-13
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_samples_that_are_lost_end_as_in_python(compiled_layer, solver):
    x = torch.zeros(5, 7).double()
    x[1], x[2], x[3, 0] = torch.nan, -18.0, -50.0
    gain = torch.tensor([0.5, 0.5, 1.0, 0.5, 400.0]).double()[:, None]
    z0 = torch.zeros(5, 7).double()
    z0[4] = -21.0
    options = {"solver": solver, "rtol": 1e-6, "max_steps": 25}
    found = compiled_layer.replace(**options)(z0, x, gain)
    expected = pydeq.fixed_point(layer, z0, x, gain, **options)
    assert "NONFINITE" in expected.statuses
    assert "CONVERGED" in expected.statuses
    same(found, expected, rtol=1e-8)


def test_options(compiled_layer):
    z0, gain = torch.zeros(5, 7).double(), torch.full((5, 1), 0.8).double()
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same(
        compiled_layer.replace(rtol=0.0, atol=1e-3)(z0, x, gain),
        pydeq.fixed_point(layer, z0, x, gain, rtol=0.0, atol=1e-3),
    )
    # Nothing meets this tolerance but an exact fixed point.
    exact = compiled_layer.replace(rtol=1e-30, max_steps=200)
    ends = {*exact(z0, x, gain).statuses, *exact.replace(stall=False)(z0, x, gain).statuses}
    assert "STALLED" in ends or "CONVERGED" in ends
    assert exact(z0, x, gain).nfe < 200
    assert "STALLED" not in exact.replace(stall=False)(z0, x, gain).statuses
    # Options that are not replaced stay.
    changed = compiled_layer.replace(rtol=1e-9).replace(max_steps=3)
    assert changed(z0, x, gain).nfe == 3
    assert not changed(z0, x, gain).converged.any()
    assert changed.solver is compiled_layer.solver


def mixing(z, rows, columns, x):
    """A contraction whose samples depend on each other."""
    return torch.tanh(rows @ z @ columns + x)


def mixing_arguments(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 5), (3, 3), (5, 3))
    )
    rows, columns = (0.8 * each / torch.linalg.matrix_norm(each, 2) for each in (rows, columns))
    return rows, columns, torch.logspace(0, -2, 5).double()[:, None] * x


@pytest.fixture(scope="module")
def compiled_mixing():
    return pydeq.CompiledSolve(mixing, torch.zeros(5, 3).double(), *mixing_arguments(0))


@pytest.mark.parametrize("solver", [pydeq.Picard(), pydeq.Anderson(), pydeq.Broyden()], ids=repr)
def test_samples_that_depend_on_each_other(compiled_mixing, solver, monkeypatch):
    z0, moved = torch.zeros(5, 3).double(), 0
    for seed in range(6):
        arguments = mixing_arguments(seed)
        for steps in range(1, 16):
            options = {"solver": solver, "rtol": 1e-2, "max_steps": steps}
            monkeypatch.setattr("pydeq.solve.iteration._warned_of_coupling", False)
            with warnings.catch_warnings(record=True) as first:
                warnings.simplefilter("always")
                found = compiled_mixing.replace(**options)(z0, *arguments)
            monkeypatch.setattr("pydeq.solve.iteration._warned_of_coupling", False)
            with warnings.catch_warnings(record=True) as second:
                warnings.simplefilter("always")
                expected = pydeq.fixed_point(mixing, z0, *arguments, **options)
            same(found, expected, rtol=1e-8)
            assert [message.category for message in first] == [message.category for message in second]
            moved += len(first)
    assert moved > 10


# --- What a map may be -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention, layer norm, dropout in evaluation mode, and a buffer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.5)
        self.shift = nn.Buffer(torch.zeros(8))

    def forward(self, z, x, mask=None):
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(z + x).chunk(3, dim=2))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.norm(x + 0.3 * self.drop(self.out(mixed)) + self.shift)


def test_a_module_s_values_are_read_at_each_call():
    torch.manual_seed(0)
    cell, x, z0 = Attention().eval(), torch.randn(3, 5, 8), torch.zeros(3, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    solve = pydeq.CompiledSolve(cell, z0, x, mask, rtol=1e-5)

    def agrees():
        found, expected = solve(z0, x, mask), pydeq.fixed_point(cell, z0, x, mask, rtol=1e-5)
        assert expected.converged.all()
        assert found.converged.all()
        assert not found.value.requires_grad
        torch.testing.assert_close(found.image, expected.image, rtol=2e-4, atol=2e-5)
        return found.image

    results = [agrees()]
    with torch.no_grad():
        cell.qkv.weight.mul_(0.5)
    results.append(agrees())
    cell.shift.add_(torch.linspace(0.0, 1.0, 8))
    results.append(agrees())
    cell.out.weight.data = torch.randn(8, 8)
    results.append(agrees())
    cell.load_state_dict(Attention().state_dict(), assign=True)
    results.append(agrees())
    cell.shift = torch.linspace(1.0, 0.0, 8)
    results.append(agrees())
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(results))
    cell.double()
    with pytest.raises(ValueError, match=r"fn's qkv.weight must be .*float32 \(24, 8\), and is .*float64"):
        solve(z0, x, mask)


def test_a_function_s_tensors_and_any_type_of_state_and_context():
    weight, table = torch.full((4, 4), 0.1), torch.randn(10, 4)

    def fn(state, x, options):
        ids, (scale, unused) = options
        assert unused is None
        return {"a": torch.tanh(scale * state["b"][0] @ weight + x), "b": (0.5 * state["a"].flip(1) + table[ids],)}

    z0 = {"a": torch.zeros(3, 4), "b": (torch.zeros(4, 3).T[:, :4].new_zeros(3, 4),)}
    x, ids = torch.randn(4, 3).T, torch.tensor([1, 4, 7])  # not contiguous
    context = x, (ids, (0.5, None))
    solve = pydeq.CompiledSolve(fn, z0, *context, rtol=1e-5)
    for _ in range(2):
        found, expected = solve(z0, *context), pydeq.fixed_point(fn, z0, *context, rtol=1e-5)
        assert type(found.value["b"]) is tuple
        same(found, expected, rtol=1e-4)
        weight.mul_(2.0)  # the function refers to it
    other = pydeq.fixed_point(fn, z0, x + 1, (ids + 1, (0.5, None)), rtol=1e-5)
    same(solve(z0, x + 1, (ids + 1, (0.5, None))), other, rtol=1e-4)
    for wrong, message in (
        ((x, (ids, (0.6, None))), "had 0.5 at compilation, got 0.6: pass what changes as a tensor"),
        ((x, (ids.int(), (0.5, None))), r"tensor 1 of the context must be .*int64 \(3,\), and is .*int32"),
        ((x[:2], (ids, (0.5, None))), r"tensor 0 of the context must be .*\(3, 4\), and is .*\(2, 4\)"),
        ((x.to("meta"), (ids, (0.5, None))), "tensor 0 of the context must be a plain dense tensor on the CPU"),
        ((x,), "the context must have the structure that it had at compilation"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(z0, *wrong)
    with pytest.raises(ValueError, match=r"as at compilation, \(3, 4\), \(3, 4\) of .*, got \(2, 4\), \(2, 4\)"):
        solve({"a": torch.zeros(2, 4), "b": (torch.zeros(2, 4),)}, *context)
    with pytest.raises(ValueError, match="the order of keys"):
        solve({"b": z0["b"], "a": z0["a"]}, *context)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(6, 4), persistent=False)


def test_modules_that_a_function_refers_to():
    """A closure, a partial's argument, a buffer that is not saved, and a matrix that is not contiguous."""
    held, other, columns = Held(), nn.Linear(4, 4), torch.randn(4, 4).T

    def map(scale, z, ids):
        return 0.2 * torch.tanh(held.linear(z) + scale(z) + held.table[ids]) + 0.1 * columns @ z

    fn = functools.partial(map, other)
    z0, ids = torch.zeros(4, 4), torch.tensor([0, 1, 2, 3])
    solve = pydeq.CompiledSolve(fn, z0[None], ids, solver=pydeq.Picard(), rtol=1e-5)

    def agrees():
        found, expected = solve(z0[None], ids), pydeq.fixed_point(fn, z0[None], ids, solver=pydeq.Picard(), rtol=1e-5)
        assert expected.converged.all()
        torch.testing.assert_close(found.image, expected.image, rtol=1e-4, atol=1e-6)
        return found.image

    results = [agrees()]
    held.table = torch.randn(6, 4)
    results.append(agrees())
    held.linear.load_state_dict(nn.Linear(4, 4).state_dict(), assign=True)
    results.append(agrees())
    nn.utils.vector_to_parameters(torch.randn(20), other.parameters())
    results.append(agrees())
    columns.copy_(torch.randn(4, 4) / 4)
    results.append(agrees())
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(results))
    other.weight.data = other.weight.data.T.contiguous().T  # the same values in another order
    torch.testing.assert_close(agrees(), results[-1])
    # A map that raises says so, and other threads go on; so does the next call.
    raised, threads = [], []

    def fails():
        try:
            solve(z0[None], torch.tensor([0, 1, 2, 60]))
        except RuntimeError as error:
            raised.append(str(error))

    for i in range(16):
        threads.append(threading.Thread(target=fails if i % 2 else agrees))
        threads[-1].start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(raised) == 8
    assert all("the compiled map failed: index out of bounds" in text and "\n" not in text for text in raised)
    torch.testing.assert_close(agrees(), results[-1])
    nn.utils.parametrizations.weight_norm(held.linear)
    with pytest.raises(ValueError, match=r"fn's linear.weight must be .*, and is None"):
        solve(z0[None], ids)


def test_a_result_that_is_not_contiguous():
    matrix = torch.randn(4, 4).T

    def fn(z, x):
        return (0.5 * torch.tanh(matrix.T + z[0]))[None] + x

    z0, x = torch.zeros(4, 4), torch.randn(4, 4).T
    with torch.inference_mode():
        solve = pydeq.CompiledSolve(fn, z0[None], x, rtol=1e-5)
    same(solve(z0[None], x), pydeq.fixed_point(fn, z0[None], x, rtol=1e-5), rtol=1e-4)


def test_autocast_is_that_of_the_compilation():
    torch.manual_seed(0)
    cell, z0 = nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 8), nn.Tanh()), torch.zeros(3, 8)  # in training mode
    with torch.autocast("cpu", torch.bfloat16):
        solve, expected = pydeq.CompiledSolve(cell, z0), pydeq.fixed_point(cell, z0)
    plain = pydeq.fixed_point(cell, z0, rtol=1e-5)
    for found in (solve(z0), solve.replace(max_steps=40)(z0)):
        same(found, expected, rtol=1e-2)
        assert (found.image - plain.image).abs().max() > 1e-5


@pytest.fixture(scope="module")
def compiled_cosine():
    return pydeq.CompiledSolve(cosine, torch.zeros(4), torch.zeros(4), rtol=1e-5)


def cosine(z, x):
    return torch.cos(z) + x


def test_scalars_in_float32(compiled_cosine):
    x = torch.tensor([0.0, 0.5, -0.5, 0.1], requires_grad=True)
    z0 = torch.arange(8.0)[::2]
    found = compiled_cosine(z0, x)
    assert found.value.shape == (4,)
    assert found.value.grad_fn is None
    same(found, pydeq.fixed_point(cosine, z0, x, rtol=1e-5), rtol=1e-5)
    assert z0.tolist() == [0.0, 2.0, 4.0, 6.0]
    with torch.inference_mode():
        same(compiled_cosine(z0, x), found)


def test_threads_share_it(compiled_cosine):
    inputs = [torch.full((4,), 0.1 * i) for i in range(8)]
    expected = [compiled_cosine(torch.zeros(4), x).value for x in inputs]
    failures = []

    def work(i):
        for _ in range(300):
            if not torch.equal(compiled_cosine(torch.zeros(4), inputs[i]).value, expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_solves_keep_no_memory(compiled_cosine):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    z0, x = torch.zeros(4), torch.zeros(4)
    for _ in range(1000):
        compiled_cosine(z0, x)
    before = resident()
    for _ in range(20_000):
        compiled_cosine(z0, x)
    assert resident() - before < 2_000_000  # a tensor's handle for each evaluation would take ten times this


def test_tensors_at_other_addresses_are_read_there(compiled_layer):
    z0, gain = torch.zeros(5, 7).double(), torch.full((5, 1), 0.5).double()
    inputs = [torch.full((5, 7), float(i)).double() for i in range(3)]
    expected = [pydeq.fixed_point(layer, z0, x, gain, rtol=1e-9) for x in inputs]
    solve = compiled_layer.replace(rtol=1e-9)
    for i in (0, 1, 0, 2, 2, 1):
        same(solve(z0, inputs[i], gain), expected[i])
        same(solve(z0, inputs[i].clone(), gain.clone()), expected[i])  # freed afterwards, and its address used again
    inputs[0].data = inputs[1].clone()
    same(solve(z0, inputs[0], gain), expected[1])


def test_tensors_that_are_replaced_during_a_solve_are_kept(compiled_layer):
    x, gain = torch.ones(5, 7).double(), nn.Parameter(torch.ones(5, 1).double())
    inputs, addresses = compiled_layer._map.tensors(torch.zeros(5, 7).double(), (x, gain))
    before = gain.data_ptr()
    gain.data = torch.zeros(5, 1).double()
    assert before in addresses
    assert inputs[2].data_ptr() == before
    assert inputs[2].eq(1.0).all()


def test_unusual_initial_states(compiled_layer):
    x, gain = torch.ones(5, 7).double(), torch.full((5, 1), 0.5).double()
    z0 = torch.linspace(-1, 1, 35).double().reshape(5, 7)
    expected = compiled_layer(z0, x, gain)
    negative = torch._neg_view(-z0)
    assert negative.is_neg()
    for start in (negative, z0.T.contiguous().T, nn.Parameter(z0), z0.clone().requires_grad_(), z0.expand(1, 5, 7)[0]):
        found = compiled_layer(start, x, gain)
        same(found, expected, rtol=0.0)
        assert type(found.value) is torch.Tensor
        assert not found.value.requires_grad
    with torch.inference_mode():
        same(compiled_layer.replace()(z0, x, gain), expected, rtol=0.0)
    first = compiled_layer.replace()
    with torch.inference_mode():
        first(z0, x, gain)
    same(first(z0, x, gain), expected, rtol=0.0)
    emptied = z0.clone()
    emptied.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="z0 must have values in memory"):
        compiled_layer(emptied, x, gain)
    with pytest.raises(ValueError, match="z0 must be a plain dense tensor on the CPU"):
        compiled_layer(z0.as_subclass(type("Named", (torch.Tensor,), {})), x, gain)
    with pytest.raises((ValueError, RuntimeError), match=r"z0|sparse"):
        compiled_layer(z0.to_sparse(), x, gain)


def test_a_default_device_changes_nothing(compiled_layer):
    z0, x, gain = torch.zeros(5, 7).double(), torch.ones(5, 7).double(), torch.full((5, 1), 0.5).double()
    expected = compiled_layer(z0, x, gain)
    with torch.device("meta"):
        solve = compiled_layer.replace()
        found = solve(z0, x, gain)
        assert found.converged.device.type == "cpu"
    same(found, expected, rtol=0.0)
    same(solve(z0, x, gain), expected, rtol=0.0)


def test_solutions_can_be_copied_and_saved(compiled_layer):
    z0, x, gain = torch.zeros(5, 7).double(), torch.ones(5, 7).double(), torch.full((5, 1), 0.5).double()
    found = compiled_layer(z0, x, gain)
    expected = pydeq.fixed_point(layer, z0, x, gain)
    for copied in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        same(copied, expected)
        torch.testing.assert_close(copied.relative_residual, found.relative_residual)
    same(found, expected)


def test_another_solve_frees_what_it_keeps(compiled_layer, monkeypatch):
    freed = []
    monkeypatch.setattr(kernels, "forget_views", lambda loop, forget=kernels.forget_views: freed.append(forget(loop)))
    other = compiled_layer.replace()
    other(torch.zeros(5, 7).double(), torch.ones(5, 7).double(), torch.ones(5, 1).double() / 2)
    del other
    assert len(freed) == 1


@pytest.mark.filterwarnings("ignore")  # of torch.export
@pytest.mark.parametrize(("entries", "most"), [(2, True), (40, False)])
def test_concatenations_of_few_and_of_many_entries(entries, most):
    def fn(z, x):
        a, b = 0.5 * torch.cos(z), 0.25 * torch.sin(z)
        parts = [a[:, i] * b[:, -1 - i] + x[:, 0] for i in range(entries)]
        mixed = torch.cat([a[:, :1] * b[:, 1:2], b[:, 1:].sqrt().nan_to_num(0.0)], 1)
        return torch.stack(parts, 1) + mixed

    z0 = torch.linspace(-1, 1, entries).double()[None]
    x = torch.tensor([[0.3]]).double()
    solve = pydeq.CompiledSolve(fn, z0, x, rtol=1e-9)
    same(solve(z0, x), pydeq.fixed_point(fn, z0, x, rtol=1e-9))
    program = torch.export.export(Wrapped(fn), (z0, x)).run_decompositions({})
    assert ahead_of_time._joins_few(program) is most


class Wrapped(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *arguments):
        return self.fn(*arguments)


def test_in_a_compiled_function(compiled_cosine):
    def step(x):
        return compiled_cosine(torch.zeros(4), x * 2).image + 1

    x = torch.full((4,), 0.1)
    torch.testing.assert_close(torch.compile(step, backend="eager")(x), step(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_cannot_be_copied_or_transformed(compiled_cosine):
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="holds machine code"):
            copied(compiled_cosine)
    with pytest.raises(RuntimeError, match=r"torch.func transforms: use pydeq.DEQ"):
        torch.vmap(lambda x: compiled_cosine(x, x).value)(torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=r"cannot be exported: use pydeq.DEQ"):
        torch.jit.trace(lambda x: compiled_cosine(x, x).value, torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"cannot be exported: use pydeq.DEQ"), pydeq.export_mode(3):
        compiled_cosine(torch.zeros(4), torch.zeros(4))
    assert repr(compiled_cosine) == (
        "CompiledSolve((4,) of torch.float32, solver=Anderson(memory=5, damping=1.0, ridge=1e-06), rtol=1e-05, atol=0,"
        " max_steps=50)"
    )


# --- What is refused -------------------------------------------------------------------------------------------------

SPARSE = torch.eye(3).to_sparse()


def under_autocast(z):
    with torch.autocast("cpu", torch.bfloat16):
        return dropout(z, 0.5).float()


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), ValueError, r"draws random numbers \(aten.dropout.*eval"),
        (lambda z: dropout(z, 0.5), ValueError, r"draws random numbers \(aten.dropout.default\)"),
        (under_autocast, ValueError, r"draws random numbers \(aten.dropout.default\)"),
        (lambda z: z + torch.randn_like(z), ValueError, r"draws random numbers \(aten.randn_like"),
        (nn.BatchNorm1d(4), ValueError, r"must not modify tensors \(running_mean.*eval"),
        (lambda z: 0.5 * z if z.sum() > 0 else z, RuntimeError, "torch.export cannot record fn: .*data-dependent"),
        (lambda z: torch.from_numpy(z.numpy()), RuntimeError, "torch.export cannot record fn: .*numpy"),
        (lambda z: z[:, :3], ValueError, r"shape of z0, expected \(3, 4\), got \(3, 3\)"),
        (lambda z: z.double(), ValueError, "must return the dtype of z0"),
        (lambda z: torch.sparse.mm(SPARSE, z), ValueError, "a plain dense tensor on the CPU, got .*torch.sparse_coo"),
    ],
)
def test_maps_that_cannot_be_compiled(fn, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message):
            pydeq.CompiledSolve(fn, torch.zeros(3, 4))


def test_an_operator_without_a_c_function():
    with pytest.raises(RuntimeError, match=r"fn uses .*aten::_linalg_solve_ex, for which AOTInductor has no C"):
        pydeq.CompiledSolve(lambda z: torch.linalg.solve(torch.eye(4), z.T).T, torch.zeros(3, 4))


def test_arguments(compiled_cosine, monkeypatch):
    z0 = torch.zeros(3, 4)
    cases: Any = (
        ((1, z0), {}, TypeError, "fn must be callable, got int"),
        ((torch.cos, z0), {"solver": "anderson"}, TypeError, "solver must be a solver"),
        ((torch.cos, z0), {"solver": pydeq.TrustRegion()}, TypeError, "takes Anderson, Picard, and Broyden without"),
        ((torch.cos, z0), {"solver": pydeq.Broyden(line_search=True)}, TypeError, "Broyden without a line search"),
        ((torch.cos, z0), {"max_steps": 0}, ValueError, "max_steps"),
        ((torch.cos, z0), {"rtol": -1.0}, ValueError, "rtol"),
        ((torch.cos, z0.bfloat16()), {}, ValueError, "float64 or float32, got torch.bfloat16"),
        ((torch.cos, torch.zeros(())), {}, ValueError, "batch"),
        ((torch.cos, z0), {"tol": 1e-3}, TypeError, "unexpected keyword argument 'tol': did you mean 'rtol'"),
        ((torch.add, z0, z0.numpy()), {}, TypeError, "context must have tensors, numbers or other plain values"),
    )
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            pydeq.CompiledSolve(*arguments, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_step': did you mean 'max_steps'"):
        compiled_cosine.replace(max_step=3)
    monkeypatch.setattr(kernels, "_library", None)
    with pytest.raises(RuntimeError, match="CompiledSolve needs pydeq's compiled kernels"):
        pydeq.CompiledSolve(torch.cos, z0)
