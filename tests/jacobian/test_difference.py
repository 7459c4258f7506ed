"""mode='difference', and mode='auto' on cells that have no second derivative."""

import concurrent.futures
import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import pydeq
from pydeq import JacobianPenalty
from pydeq.jacobian import graphs, modes
from pydeq.testing import CallCounter

BATCH, LENGTH, WIDTH = 3, 5, 8
FINE = {"order": 2, "step": 1e-4}


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(modes, "_warned", set())
    monkeypatch.setattr(graphs, "_verdicts", {})


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, z, x):
        return self.norm(x + self.attention(z, z, z, need_weights=False)[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, z, x):
        return self.layer(0.5 * z + x)


class ScaledDotProduct(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.qkv, self.causal = nn.Linear(WIDTH, 3 * WIDTH), causal
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool())

    def forward(self, z, x):
        q, k, v = self.qkv(z).view(*z.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mask = None if self.causal else self.mask
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return torch.tanh(x + y.transpose(1, 2).reshape(z.shape))


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class OnceSine(Sine):
    backward = staticmethod(once_differentiable(Sine.backward))


class SilentSine(Sine):
    """As functions do whose backward pass is a kernel that autograd does not see."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient.detach() * ctx.saved_tensors[0].detach().cos()


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, z, x):
        return self.function(0.5 * self.linear(z) + x)


CELLS = {
    "MultiheadAttention": (Attention, "flash_attention_for_cpu_backward is not implemented"),
    "TransformerEncoderLayer": (Encoder, "flash_attention_for_cpu_backward is not implemented"),
    "causal": (lambda: ScaledDotProduct(True), "flash_attention_for_cpu_backward is not implemented"),
    "mask": (lambda: ScaledDotProduct(False), "flash_attention_for_cpu_backward is not implemented"),
    "once": (lambda: Custom(OnceSine.apply), "OnceSine is marked with once_differentiable"),
    "silent": (lambda: Custom(SilentSine.apply), "the backward pass of SilentSine leaves no graph"),
}


def problem(make, dtype=torch.float64):
    torch.manual_seed(0)
    cell = make().to(dtype)
    return cell, *torch.randn(2, BATCH, LENGTH, WIDTH).to(dtype)


def seeded():
    return torch.Generator().manual_seed(3)


def gradients(cell, penalty):
    found = torch.autograd.grad(penalty, list(cell.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def exact(cell, z, x, **options):
    """The penalty by forward mode of a twin of the cell that can be differentiated twice, and its gradient."""
    twin = copy.deepcopy(cell)
    if isinstance(twin, Custom):
        twin.function = torch.sin
    with sdpa_kernel(SDPBackend.MATH):
        penalty = pydeq.jacobian_penalty(twin, z, x, mode="jvp", generator=seeded(), **options)
        return penalty, gradients(twin, penalty)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside of torch's forward mode
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "exact"])
@pytest.mark.parametrize("name", CELLS)
def test_auto_takes_differences_and_says_why_once(name, method):
    make, reason = CELLS[name]
    cell, z, x = problem(make)
    options = {"method": method, "probes": 4}
    with pytest.warns(RuntimeWarning, match=reason) as warned:
        penalty = pydeq.jacobian_penalty(cell, z, x, generator=seeded(), **options, **FINE)
    assert len(warned) == 1
    if "attention" in reason:
        assert "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)" in str(warned[0].message)
    pydeq.jacobian_penalty(cell, z, x, generator=seeded(), **options)  # another warning would be an error
    expected, wanted = exact(cell, z, x, **options)
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients(cell, penalty), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_what_the_warning_advises_gives_exact_derivatives_without_one(name):
    cell, z, x = problem(CELLS[name][0])
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(cell, Custom):
            cell.function = Sine.apply
        penalty = pydeq.jacobian_penalty(cell, z, x, method="exact")
        torch.testing.assert_close(penalty, exact(cell, z, x, method="exact")[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", CELLS)
def test_vjp_gives_a_value_whose_gradient_says_what_to_use(name):
    make, reason = CELLS[name]
    cell, z, x = problem(make)
    penalty = pydeq.jacobian_penalty(cell, z, x, mode="vjp")
    assert penalty > 0
    with pytest.raises(RuntimeError, match=rf"{reason}.*use mode='difference'"):
        penalty.backward()
    with torch.no_grad():
        pydeq.jacobian_penalty(cell, z, x)  # a value needs no second derivative


def test_a_function_that_torch_func_does_not_take_says_what_to_use_in_mode_jvp():
    cell, z, x = problem(CELLS["once"][0])
    with pytest.raises(RuntimeError, match="without setup_context: use mode='vjp' or 'difference'"):
        pydeq.jacobian_penalty(cell, z, x, mode="jvp")


def test_a_cell_that_can_be_differentiated_twice_is():
    cell, z, x = problem(lambda: Custom(Sine.apply))
    one, other = (pydeq.jacobian_penalty(cell, z, x, mode=mode, generator=seeded()) for mode in ("auto", "vjp"))
    assert torch.equal(one, other)
    assert torch.equal(gradients(cell, one), gradients(cell, other))


@pytest.mark.parametrize("kind", ["cell", "part"])
def test_compiled_cells(kind):
    cell, z0, x = problem(lambda: Custom(torch.sin))
    compiled = copy.deepcopy(cell)
    if kind == "part":
        compiled.linear = torch.compile(compiled.linear, backend="aot_eager")
    else:
        compiled = torch.compile(compiled, backend="aot_eager")
    found = []
    for each, mode in ((cell, "difference"), (compiled, "auto"), (compiled, "difference")):
        deq = pydeq.DEQ(each, rtol=1e-10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            torch.manual_seed(1)
            z, solution = deq(torch.zeros_like(z0), x, return_solution=True, penalty=JacobianPenalty(1.0, mode=mode))
            loss = z.square().sum() + solution.penalty
            found.append((solution.penalty.detach(), gradients(each, loss)))
        assert sum("does not currently support double backward" in str(w.message) for w in caught) == (mode == "auto")
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("order", "probes", "more"), [(1, 1, 1), (1, 3, 3), (2, 1, 2), (2, 3, 6)])
def test_a_layer_takes_the_evaluation_that_attaches_the_graph_as_f_of_z(order, probes, more):
    cell, z0, x = problem(lambda: Custom(torch.sin))
    deq = pydeq.DEQ(CallCounter(cell), rtol=1e-10)
    options = {"mode": "difference", "order": order, "probes": probes}
    torch.manual_seed(0)
    _, solution = deq(z0, x, return_solution=True, penalty=JacobianPenalty(0.7, **options))
    assert deq.cell.calls == solution.nfe + 1 + more
    torch.manual_seed(0)
    expected = 0.7 * pydeq.jacobian_penalty(cell, solution.image, x, **options)
    torch.testing.assert_close(solution.penalty, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients(cell, solution.penalty), gradients(cell, expected), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("order", "probes", "calls"), [(1, 1, 2), (1, 4, 5), (2, 1, 2), (2, 4, 8)])
def test_evaluations_of_a_call(order, probes, calls):
    cell, z, x = problem(lambda: Custom(torch.sin))
    counted = CallCounter(cell)
    pydeq.jacobian_penalty(counted, z, x, mode="difference", order=order, probes=probes)
    assert counted.calls == calls


def test_orders_of_convergence():
    cell, z, x = problem(lambda: Custom(torch.sin))
    reference = exact(cell, z, x, probes=2)[1]
    for order in (1, 2):
        errors = []
        for step in (0.02, 0.01):
            options = {"mode": "difference", "order": order, "step": step, "probes": 2, "generator": seeded()}
            found = gradients(cell, pydeq.jacobian_penalty(cell, z, x, **options))
            errors.append(float((found - reference).norm()))
        assert abs(errors[0] / errors[1] - 2**order) < 0.1 * 2**order


def test_second_derivatives_of_a_penalty_on_a_norm():
    """By differences they are second ones of fn, and right; by vjp they would be third ones, and raise."""
    torch.manual_seed(0)
    z = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    move = torch.randn(WIDTH, WIDTH, dtype=torch.float64)

    def gradient(t, create_graph=True, **options):
        moved = (weight + t * move).requires_grad_()
        penalty = pydeq.jacobian_penalty(
            lambda z: functional.layer_norm(torch.tanh(z @ moved), (WIDTH,)), z, generator=seeded(), **options
        )
        return torch.autograd.grad(penalty, moved, create_graph=create_graph)[0], moved

    fine = {"mode": "difference", **FINE}
    g, moved = gradient(0.0, **fine)
    (product,) = torch.autograd.grad((g * move).sum(), moved)
    h = 1e-4
    expected = (gradient(h, False, **fine)[0] - gradient(-h, False, **fine)[0]) / (2 * h)
    torch.testing.assert_close((product * move).sum(), (expected * move).sum(), rtol=1e-5, atol=1e-7)
    g, moved = gradient(0.0, mode="vjp")
    with pytest.raises(
        RuntimeError, match=r"a third derivative of layer norm, which is wrong in torch \(pytorch#175754"
    ):
        torch.autograd.grad((g * move).sum(), moved)
    g, moved = gradient(0.0, mode="jvp")
    (product,) = torch.autograd.grad((g * move).sum(), moved)
    expected = (gradient(h, False, mode="jvp")[0] - gradient(-h, False, mode="jvp")[0]) / (2 * h)
    torch.testing.assert_close((product * move).sum(), (expected * move).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_norm_out_of_reach_is_refused_in_mode_jvp():
    cell, z, _ = problem(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)))
    scripted = torch.jit.trace(cell, z)
    with pytest.raises(RuntimeError, match=r"a derivative of layer norm is needed that torch has wrong.*TorchScript"):
        pydeq.jacobian_penalty(scripted, z, mode="jvp")


@pytest.mark.parametrize("order", [1, 2])
def test_all_evaluations_draw_the_same_random_numbers(order):
    linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    z = torch.randn(BATCH, WIDTH, dtype=torch.float64)

    def fn(z):
        return functional.dropout(linear(z), 0.5)

    found = []
    for mode in ("difference", "jvp"):
        torch.manual_seed(2)
        options = {"order": order} if mode == "difference" else {}
        found.append(pydeq.jacobian_penalty(fn, z, mode=mode, generator=seeded(), probes=3, **options))
    if order == 2:  # one mask for all probes in both
        torch.testing.assert_close(*found, rtol=1e-9, atol=0)
    assert float(found[0].detach()) < 3.0  # other masks would give some ten


@pytest.mark.filterwarnings("ignore:the cell draws random numbers")
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_a_layer_with_dropout(freeze):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
            self.dropout = nn.Dropout(0.5)

        def forward(self, z, x):
            return self.dropout(0.1 * self.linear(z) + x)

    torch.manual_seed(0)
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    deq = pydeq.DEQ(CallCounter(Noisy()) if freeze else Noisy(), freeze_rng=freeze, max_steps=5)
    penalty = JacobianPenalty(1.0, mode="difference")
    _, solution = deq(torch.zeros_like(x), x, return_solution=True, penalty=penalty)
    assert solution.penalty < 0.1  # other masks would give some ten
    if freeze:
        assert deq.cell.calls == solution.nfe + 2


@pytest.mark.filterwarnings("ignore:the samples of a batch depend on each other")  # by batch norm
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_running_statistics_change_as_by_one_evaluation(order):
    torch.manual_seed(0)
    cell = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
    z = torch.randn(BATCH, WIDTH)
    for fn in (cell, lambda z: cell(z)):
        own = copy.deepcopy(cell.state_dict())
        pydeq.jacobian_penalty(fn, z, mode="difference", order=order, probes=3).backward()
        assert int(cell[1].num_batches_tracked) == int(own["1.num_batches_tracked"]) + 1
        cell.load_state_dict(own)

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = cell

        def forward(self, z, x):
            return 0.1 * self.body(z) + x

    deq = pydeq.DEQ(Cell(), max_steps=4)
    penalty = JacobianPenalty(1.0, mode="difference", order=order, probes=2)
    before = int(cell[1].num_batches_tracked)
    output, solution = deq(torch.zeros_like(z), z, return_solution=True, penalty=penalty)
    assert int(cell[1].num_batches_tracked) == before + 1  # once per call of the layer
    (output.sum() + solution.penalty).backward()


@pytest.mark.parametrize("kind", ["jvp", "difference"])
def test_tuple_states_of_different_scale(kind):
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64) / 3
    z = 1e3 * torch.randn(BATCH, 2, dtype=torch.float64), 1e-2 * torch.randn(BATCH, 4, dtype=torch.float64)

    def fn(z):
        y = torch.cat([1e-3 * z[0], 1e2 * z[1]], 1) @ weight
        y = torch.tanh(y)
        return 1e3 * y[:, :2], 1e-2 * y[:, 2:]

    options = {} if kind == "jvp" else {"order": 2, "step": 1e-3}
    found = pydeq.frobenius_norm_squared(fn, z, mode=kind, generator=seeded(), **options)
    expected = pydeq.frobenius_norm_squared(fn, z, mode="jvp", generator=seeded())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_states_and_autocast(dtype):
    cell, z, x = problem(lambda: Custom(torch.sin), torch.float32)
    options = {"mode": "difference", "probes": 8}
    expected = pydeq.jacobian_penalty(cell, z, x, generator=seeded(), **options)
    with torch.autocast("cpu", dtype):
        cast = pydeq.jacobian_penalty(cell, z, x, generator=seeded(), **options)
    halved = copy.deepcopy(cell).to(dtype)
    half = pydeq.jacobian_penalty(halved, z.to(dtype), x.to(dtype), generator=seeded(), **options)
    for penalty, of in ((cast, cell), (half, halved)):
        assert penalty.dtype == torch.float32
        torch.testing.assert_close(penalty, expected, rtol=0.03, atol=0)
        assert gradients(of, penalty).isfinite().all()


def test_a_sample_that_is_not_finite_leaves_the_others_alone():
    z = torch.randn(4, WIDTH, dtype=torch.float64)
    options = {"mode": "difference", "generator": seeded()}
    z[1] = torch.nan
    found = pydeq.frobenius_norm_squared(torch.sin, z, **options)
    assert found[[0, 2, 3]].isfinite().all()
    assert found[1].isnan()


def test_a_state_of_zeros_takes_the_step_itself():
    zero = torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    found = pydeq.frobenius_norm_squared(lambda z: 2.0 * z, zero, mode="difference", distribution="rademacher")
    torch.testing.assert_close(found, torch.full((BATCH,), 4.0 * WIDTH, dtype=torch.float64))


def test_without_gradients_there_is_no_graph():
    cell, z, x = problem(lambda: Custom(torch.sin))
    options = {"mode": "difference", "probes": 2}
    expected = pydeq.jacobian_penalty(cell, z, x, generator=seeded(), **options)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(pydeq.jacobian_penalty(cell, z, x, generator=seeded(), **options), expected)
    with torch.inference_mode():
        inside = pydeq.jacobian_penalty(cell, z.clone(), x.clone(), generator=seeded(), **options)
    assert torch.equal(inside, expected)
    assert not inside.requires_grad


def test_under_transforms():
    _, z, x = problem(lambda: Custom(torch.sin))
    weights = torch.randn(2, WIDTH, WIDTH, dtype=torch.float64)

    def estimate(weight):
        return pydeq.jacobian_penalty(
            lambda z, x: torch.tanh(z @ weight + x), z, x, probes=3, mode="difference", generator=seeded()
        )

    leaves = weights.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(estimate(leaf) for leaf in leaves), leaves)
    torch.testing.assert_close(torch.func.grad(estimate)(weights[0]), expected[0])
    mapped = torch.func.vmap(torch.func.grad(estimate), randomness="same")(weights)
    torch.testing.assert_close(mapped, expected)


def test_context_and_captured_tensors_get_gradients():
    _, z, x = problem(lambda: Custom(torch.sin))
    x, scale = x.requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = [
        torch.autograd.grad(
            pydeq.jacobian_penalty(lambda z, x: torch.tanh(scale * z * x), z, x, mode=mode, generator=seeded(), **more),
            (x, scale),
        )
        for mode, more in (("difference", FINE), ("jvp", {}))
    ]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the Jacobian penalty is made of differences of fn")
def test_training_on_fused_attention_shrinks_the_jacobian():
    cell, z0, x = problem(Attention, torch.float32)
    deq = pydeq.DEQ(cell, max_steps=8)
    optimizer = torch.optim.Adam(deq.parameters(), lr=1e-2)
    penalties = []
    torch.manual_seed(0)
    for _ in range(20):
        _, solution = deq(z0, x, return_solution=True, penalty=JacobianPenalty(1.0))
        optimizer.zero_grad()
        solution.penalty.backward()
        optimizer.step()
        penalties.append(solution.penalty.item())
    assert penalties[-1] < 0.3 * penalties[0]


class Halved(torch.autograd.Function):
    """tanh(x) / 2, for torch.func as well."""

    @staticmethod
    def forward(x):
        return x.tanh() / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def vmap(info, in_dims, x):
        return Halved.apply(x), in_dims[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (0.5 - 2 * y.square())


class HalvedCast(Halved):
    """Wrapped once more, as by torch.amp.custom_bwd."""

    backward = staticmethod(functools.wraps(Halved.backward)(lambda ctx, g: Halved.backward(ctx, g)))


class Cut(Halved):
    """Its backward pass leaves no graph, and does not say so."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            return g * (0.5 - 2 * y.square())


def weighed(function):
    """A penalty of a weight, and the weight."""
    z, x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def penalty(weight, **options):
        generator = torch.Generator().manual_seed(2)
        return pydeq.jacobian_penalty(lambda z, x: function(z @ weight + x), z, x, generator=generator, **options)

    return penalty, weight


@pytest.mark.parametrize("function", [Halved, HalvedCast, Cut])
def test_a_penalty_without_a_graph_is_never_left_out_of_a_gradient(function):
    """What torch.autograd.grad finds no path for, it leaves out without a word."""
    penalty, weight = weighed(function.apply)
    for of in (lambda loss: loss.backward(), lambda loss: torch.autograd.grad(loss, weight, allow_unused=True)):
        loss = weight.square().sum() + penalty(weight, mode="vjp")
        with pytest.raises(RuntimeError, match=r"mode='vjp' needs second derivatives.*use mode='difference'"):
            of(loss)
    (found,) = torch.autograd.grad(penalty(weight, mode="difference", **FINE), weight)
    plain = weighed(lambda x: x.tanh() / 2)[0]
    (expected,) = torch.autograd.grad(plain(weight, mode="jvp"), weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    with pytest.warns(RuntimeWarning, match="made of differences of fn"):
        (found,) = torch.autograd.grad(penalty(weight), weight)
    assert found.norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("mode", ["vjp", "auto"])
@pytest.mark.parametrize("function", [Halved, HalvedCast])
def test_torch_func_refuses_what_it_would_differentiate_wrongly(function, mode):
    penalty, weight = weighed(function.apply)
    with pytest.raises(RuntimeError, match="marked with once_differentiable: use mode='difference'"):
        torch.func.grad(lambda weight: penalty(weight, mode=mode))(weight.detach())
    with torch.no_grad():
        torch.func.vmap(lambda weight: penalty(weight, mode=mode), randomness="same")(weight.detach()[None])
    found = torch.func.grad(lambda weight: penalty(weight, mode="difference"))(weight.detach())
    torch.testing.assert_close(found, torch.autograd.grad(penalty(weight, mode="difference"), weight)[0])


@pytest.mark.parametrize("mode", ["vjp", "auto"])
def test_what_does_not_depend_on_the_state_needs_first_derivatives_only(mode):
    """Here an encoder of x, inside of the cell."""
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad(
            pydeq.jacobian_penalty(
                lambda z, x, of=of: torch.tanh(z + of(x)), z, x, mode=mode, generator=torch.Generator().manual_seed(2)
            ),
            x,
        )
        for of in (Halved.apply, lambda x: x.tanh() / 2)
    )
    torch.testing.assert_close(found, expected)


def test_threads_share_what_is_known_of_graphs(monkeypatch):
    """Each forgets it all the time."""
    monkeypatch.setattr(graphs, "_KEPT", 1)
    z = torch.randn(2, 3)
    cells = [lambda z: torch.tanh(z) / 2, lambda z: torch.sin(z) / 2, lambda z: torch.sigmoid(z)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda k: pydeq.jacobian_penalty(cells[k % 3], z), range(300)))


def cell_with(spectral_norm):
    torch.manual_seed(0)
    linear = spectral_norm(nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(linear, nn.Tanh()).double().train()


SPECTRAL = [parametrizations.spectral_norm, nn.utils.spectral_norm, pydeq.nn.spectral_norm]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spectral_norm", SPECTRAL)
def test_all_evaluations_see_one_step_of_the_power_method(spectral_norm, order):
    """Else the difference is one of two weights as well, which a small step makes large."""
    z = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cell, moved = cell_with(spectral_norm), cell_with(spectral_norm)
    moved(z)
    buffers = [x.clone() for x in moved.buffers()]
    draw, options = torch.Generator(), {"mode": "difference", "order": order, "step": 1e-6}
    expected = pydeq.jacobian_penalty(moved.eval(), z, **options, generator=draw.manual_seed(2))
    found = pydeq.jacobian_penalty(cell, z, **options, generator=draw.manual_seed(2))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert all(torch.equal(x, value) for x, value in zip(cell.buffers(), buffers, strict=True))
    assert all(part.training for part in cell.modules())
