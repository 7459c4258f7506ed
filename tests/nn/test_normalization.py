"""Weight norm and spectral norm: their values and gradients, how often they are computed, and that nothing is stale."""

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pydeq
from pydeq.nn import apply_norm, remove_norm, solve_scope, spectral_norm, weight_norm
from pydeq.nn.normalization import SpectralNorm, WeightNorm

DIM, BATCH = 5, 3

LAYERS = [
    lambda: nn.Linear(4, 6),
    lambda: nn.Conv1d(4, 6, 3),
    lambda: nn.Conv2d(4, 6, 3),
    lambda: nn.ConvTranspose2d(4, 6, 3),
]
NORMS = [weight_norm, spectral_norm]


class Cell(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(DIM, DIM).double()
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        norm(self.linear)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs():
    x = torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.zeros_like(x), x


def originals(module, name="weight"):
    return dict(module.parametrizations[name].named_parameters(recurse=False))


@pytest.fixture
def computed(monkeypatch):
    """A list that grows with each weight computed."""
    found = []
    for kind in (WeightNorm, SpectralNorm):
        original = kind._normalized
        monkeypatch.setattr(
            kind, "_normalized", lambda self, *s, original=original: found.append(self) or original(self, *s)
        )
    return found


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_weight_norm_is_torchs(make, dim):
    torch.manual_seed(0)
    layer = make().double()
    plain = layer.weight.detach().clone()
    twin = parametrizations.weight_norm(copy.deepcopy(layer), dim=None if dim is None else dim % plain.dim())
    weight_norm(layer, dim=dim)
    torch.testing.assert_close(layer.weight.detach(), plain)
    assert list(layer.state_dict()) == list(twin.state_dict())
    for key, value in twin.state_dict().items():
        if dim is None:
            value = value.reshape(layer.state_dict()[key].shape)
        torch.testing.assert_close(layer.state_dict()[key], value)
    cotangent = torch.randn_like(plain)
    ours = torch.autograd.grad((layer.weight * cotangent).sum(), originals(layer).values())
    theirs = torch.autograd.grad((twin.weight * cotangent).sum(), originals(twin).values())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape))


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize(("bound", "clip"), [(1.0, False), (0.7, False), (0.7, True), (50.0, True)])
def test_spectral_norm_bounds_the_largest_singular_value(make, bound, clip):
    torch.manual_seed(0)
    layer = make().double()
    plain = layer.weight.detach().clone()
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0

    def sigma(weight):
        return torch.linalg.matrix_norm(weight.movedim(dim, 0).flatten(1), 2).item()

    spectral_norm(layer, bound=bound, clip=clip, n_power_iterations=500)
    expected = min(bound, sigma(plain)) if clip else bound
    assert sigma(layer.weight.detach()) == pytest.approx(expected, rel=1e-6)
    if clip and bound > sigma(plain):
        assert torch.equal(layer.weight, plain)


def map_norm(conv, size=6):
    """The largest singular value of a convolution's map of 4 channels, from its matrix."""
    images = torch.eye(4 * size * size, dtype=torch.float64).view(-1, 4, size, size)
    return torch.linalg.matrix_norm(conv(images).flatten(1), 2)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_contracts_if_the_bound_is_divided_by_its_width(make, k):
    for seed in range(3):
        torch.manual_seed(seed)
        conv = make(4, 4, k, padding=k // 2, bias=False, dtype=torch.float64)
        if seed == 0:
            nn.init.constant_(conv.weight, 1.0)  # the worst case
        spectral_norm(conv, bound=0.9 / k, n_power_iterations=300)
        assert map_norm(conv) <= 0.9 * (1 + 1e-6)


def test_a_convolution_whose_matrix_is_bounded_may_expand():
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    nn.init.constant_(conv.weight, 1.0)
    spectral_norm(conv, bound=0.9, n_power_iterations=100)
    torch.testing.assert_close(map_norm(conv), torch.tensor(3 * 0.9, dtype=torch.float64))


def test_spectral_norm_differentiates_with_its_directions_fixed():
    layer = spectral_norm(nn.Linear(4, 6).double(), bound=0.8).eval()
    original = layer.parametrizations.weight.original
    norm = layer.parametrizations.weight[0]
    cotangent = torch.randn_like(original)
    (ours,) = torch.autograd.grad((layer.weight * cotangent).sum(), original)
    expected = 0.8 * original / (norm._u @ original @ norm._v)
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * cotangent).sum(), original)[0])


@pytest.mark.parametrize("norm", NORMS)
def test_computed_once_for_the_solve_and_once_for_the_graph(norm, computed):
    deq, (z0, x) = pydeq.DEQ(Cell(norm), rtol=1e-8), inputs()
    computed.clear()
    for _ in range(2):
        with torch.no_grad():
            assert deq(z0, x, return_solution=True)[1].nfe > 3
        assert len(computed) == 1
        computed.clear()
        z, solution = deq(z0, x, return_solution=True)
        assert solution.nfe > 3
        assert len(computed) == 2
        z.sum().backward()
        assert len(computed) == 2
        computed.clear()
    pydeq.fixed_point(deq.cell, z0, x)
    assert len(computed) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("adjoint", "weights"), [(pydeq.Phantom(steps=6), 2), (pydeq.Unrolled(), 1)], ids=str)
def test_unrolled_steps_share_one_weight(norm, adjoint, weights, computed):
    (z0, x), cell = inputs(), Cell(norm).eval()
    parameters = tuple(cell.parameters())
    deq = pydeq.DEQ(cell, solver=pydeq.Picard(), adjoint=adjoint, rtol=1e-12, max_steps=200)
    for _ in range(2):
        computed.clear()
        found = torch.autograd.grad(deq(z0, x).sum(), parameters)
        assert len(computed) == weights
    z = z0 if isinstance(adjoint, pydeq.Unrolled) else pydeq.fixed_point(cell, z0, x, rtol=1e-12).image
    for _ in range(200 if isinstance(adjoint, pydeq.Unrolled) else 6):
        z = cell(z, x)
    for ours, expected in zip(found, torch.autograd.grad(z.sum(), parameters), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("adjoint", [pydeq.Unrolled(checkpoint=True), pydeq.Reversible(checkpoints=10)], ids=str)
def test_adjoints_that_evaluate_again_give_the_implicit_gradient(norm, adjoint):
    (z0, x), cell = inputs(), Cell(norm)
    norm_module = cell.linear.parametrizations.weight[0]
    parameters, before = tuple(cell.parameters()), copy.deepcopy(norm_module.state_dict())
    exact = pydeq.DEQ(cell, adjoint=pydeq.Implicit(rtol=1e-12), rtol=1e-12, max_steps=200)
    expected = torch.autograd.grad(exact(z0, x).square().sum(), parameters)
    norm_module.load_state_dict(before)
    z = pydeq.DEQ(cell, adjoint=adjoint, rtol=1e-10, max_steps=200)(z0, x)
    exact(z0, x)  # moves the directions of the spectral norm on
    for ours, other in zip(torch.autograd.grad(z.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-8)


def test_one_step_of_power_iteration_per_solve():
    deq, (z0, x) = pydeq.DEQ(Cell(spectral_norm), rtol=1e-8), inputs()
    norm = deq.cell.linear.parametrizations.weight[0]
    weight = deq.cell.linear.parametrizations.weight.original
    torch.nn.init.normal_(norm._v)
    for grad in (True, False):
        v = norm._v.clone()
        with torch.set_grad_enabled(grad):
            z = deq(z0, x)
        u = torch.nn.functional.normalize(weight @ v, dim=0)
        torch.testing.assert_close(norm._u, u.detach())
        torch.testing.assert_close(norm._v, torch.nn.functional.normalize(weight.T @ u, dim=0).detach())
        if grad:  # and none in backward, even where that evaluates the cell again
            torch.autograd.grad(z.sum(), weight, create_graph=True)
            torch.testing.assert_close(norm._u, u.detach())
    before = norm._u.clone(), norm._v.clone()
    deq.eval()(z0, x).sum().backward()
    assert torch.equal(norm._u, before[0])
    assert torch.equal(norm._v, before[1])


def test_backward_sees_the_directions_of_its_forward():
    deq, (z0, x) = pydeq.DEQ(Cell(spectral_norm), adjoint=pydeq.Implicit(rtol=1e-12), rtol=1e-12), inputs()
    weight, norm = deq.cell.linear.parametrizations.weight.original, deq.cell.linear.parametrizations.weight[0]
    torch.nn.init.normal_(norm._v)

    def second(z):
        (g,) = torch.autograd.grad(z.square().sum(), weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), weight)[0]

    z = deq(z0, x)
    expected_directions = norm._u.clone(), norm._v.clone()
    deq(z0, x)
    deq(z0, x)
    moved = second(z)
    norm._u.copy_(expected_directions[0])
    norm._v.copy_(expected_directions[1])
    torch.testing.assert_close(moved, second(deq.eval()(z0, x)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_to_second_order(norm):
    deq, (z0, x) = pydeq.DEQ(Cell(norm).eval(), adjoint=pydeq.Implicit(rtol=1e-12), rtol=1e-12, max_steps=200), inputs()
    names = [name for name, _ in deq.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in deq.parameters()]

    def solve(*values):
        return torch.func.functional_call(deq, dict(zip(names, values, strict=True)), (z0, x))

    assert torch.autograd.gradcheck(solve, values)
    assert torch.autograd.gradgradcheck(solve, values)


@pytest.mark.parametrize("norm", NORMS)
def test_two_forwards_before_two_backwards(norm):
    deq, (z0, x) = pydeq.DEQ(Cell(norm)), inputs()
    first, second = deq(z0, x), deq(z0, 2 * x)
    first.sum().backward()
    second.sum().backward()
    with solve_scope():
        first, second = deq(z0, x), deq(z0, 2 * x)
        first.sum().backward()
        second.sum().backward()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_nothing_is_stale(norm):
    cell = Cell(norm).eval()
    deq, (z0, x) = pydeq.DEQ(cell, rtol=1e-10), inputs()

    def is_fresh(z, z0=z0, x=x):
        linear = cell.linear
        twin = nn.functional.linear(z, linear.parametrizations.weight(), linear.bias)
        torch.testing.assert_close(z, torch.tanh(0.5 * twin + x), rtol=1e-6, atol=1e-7)

    changed = {key: 1.3 * value + 0.1 for key, value in deq.state_dict().items()}
    for scope in (solve_scope, torch.no_grad):
        with scope(), torch.no_grad():
            is_fresh(deq(z0, x))
            with torch.enable_grad():
                deq(z0, x).square().sum().backward()
                torch.optim.SGD(deq.parameters(), 0.5).step()
            is_fresh(deq(z0, x))
            deq.load_state_dict(changed)
            is_fresh(deq(z0, x))
            deq.load_state_dict({key: value.clone() for key, value in changed.items()}, assign=True)
            is_fresh(deq(z0, x))
            cell.linear.weight = 0.9 * cell.linear.weight + 0.01
            is_fresh(deq(z0, x))
            deq.to(torch.float32)
            is_fresh(deq(z0.float(), x.float()), z0.float(), x.float())
            deq.to(torch.float64)
            is_fresh(deq(z0, x))


def in_place(parameter):
    parameter.add_(torch.randn_like(parameter))


def other_memory(parameter):
    parameter.data = torch.randn_like(parameter)


@pytest.mark.parametrize("change", [in_place, other_memory])
@pytest.mark.parametrize("norm", NORMS)
def test_a_scope_does_not_keep_what_is_not_so_any_more(norm, change):
    layer = norm(nn.Linear(4, 6), **({"n_power_iterations": 200} if norm is spectral_norm else {}))
    with torch.no_grad(), solve_scope():
        before = layer.weight
        assert layer.weight is before
        for parameter in originals(layer).values():
            change(parameter)
        now = layer.weight
        assert layer.weight is now
        if norm is weight_norm:
            g, v = originals(layer).values()
            torch.testing.assert_close(now, torch._weight_norm(v, g, 0))
        else:  # also its directions
            assert torch.linalg.matrix_norm(now, 2).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_what_inference_mode_computed_serves_gradients(norm):
    cell, (z0, x) = Cell(norm).requires_grad_(False), inputs()
    x.requires_grad_()
    with solve_scope():
        with torch.inference_mode():
            pydeq.DEQ(cell)(z0, x)
        pydeq.DEQ(cell)(z0, x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("outer", [contextlib.nullcontext, solve_scope])
def test_the_weight_of_the_solve_does_not_live_as_long_as_the_graph(outer, monkeypatch):
    cell, (z0, x) = Cell(weight_norm), inputs()
    seen = []
    original = WeightNorm.forward

    def forward(self, *sources):
        seen.append(original(self, *sources))
        return seen[-1]

    monkeypatch.setattr(WeightNorm, "forward", forward)
    with outer():
        z = pydeq.DEQ(cell)(z0, x)
        pydeq.fixed_point(cell, z0, x)
    weights = [weakref.ref(weight) for weight in seen if not weight.requires_grad]
    assert len(weights) > 3
    seen.clear()
    assert all(weight() is None for weight in weights)
    z.sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_training_fits_a_target(norm):
    deq, (z0, x) = pydeq.DEQ(Cell(norm)), inputs()
    target = torch.rand(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5
    optimizer = torch.optim.Adam(deq.parameters(), lr=3e-2)
    before = {name: value.detach().clone() for name, value in deq.named_parameters()}
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (deq(z0, x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in deq.named_parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_their_own(norm, clone, computed):
    cell, (z0, x) = Cell(norm), inputs()
    if norm is weight_norm:
        norm(cell.linear, "bias")
    deq = pydeq.DEQ(cell, rtol=1e-8)
    deq(z0, x).sum().backward()
    twin = clone(deq).eval()
    assert list(twin.state_dict()) == list(deq.state_dict())
    assert torch.equal(twin(z0, x), deq.eval()(z0, x))
    assert isinstance(twin.cell.linear, nn.Linear)
    computed.clear()
    with torch.no_grad():
        expected = deq(z0, x)
        count = len(computed)
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(twin(z0, x), expected)
        assert len(computed) == 2 * count
        assert torch.equal(deq(z0, x), expected)
        again = clone(twin)
        assert torch.equal(again(z0, x), twin(z0, x))
        twin.load_state_dict(deq.state_dict())
        assert torch.equal(twin(z0, x), expected)
    remove_norm(twin)
    assert type(twin.cell.linear) is nn.Linear
    assert isinstance(deq.cell.linear.parametrizations, nn.ModuleDict)


@pytest.mark.parametrize("norm", NORMS)
def test_checkpoints_of_torchs_norms_load(norm):
    torch.manual_seed(3)
    layer = nn.Linear(4, 6)
    ours = norm(copy.deepcopy(layer)).eval()
    with torch.no_grad():
        layer.weight.mul_(2.0)
    kind = norm.__name__
    theirs = getattr(parametrizations, kind)(layer).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)
    # The older names.
    keys = {
        "weight_norm": {"original0": "weight_g", "original1": "weight_v"},
        "spectral_norm": {"original": "weight_orig", "0._u": "weight_u", "0._v": "weight_v"},
    }[kind]
    old = {keys.get(key.removeprefix("parametrizations.weight."), key): v for key, v in theirs.state_dict().items()}
    for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        fresh = clone(norm(nn.Linear(4, 6)).eval())
        fresh.load_state_dict(old)
        torch.testing.assert_close(fresh.weight, theirs.weight)
    remove_norm(fresh)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict(old)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 6, 3))
        self.head = nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2)


def test_apply_norm_to_a_model():
    model = Model()
    found = apply_norm(model, "weight_norm", filter=lambda name, _: not name.startswith("attention"))
    assert found == ["block.0.weight", "block.2.weight", "head.weight"]
    assert model.block[2].parametrizations.weight.original0.shape == (1, 6, 1, 1)
    assert model.head.parametrizations.weight.original0.shape == (3, 1)
    assert apply_norm(model, "weight_norm", names="in_proj_weight") == ["attention.in_proj_weight"]
    assert apply_norm(Model(), "spectral_norm", names=["weight"], bound=0.9)[0] == "embedding.weight"
    assert apply_norm(Model().head, "weight_norm", dim=None) == ["weight"]


def test_remove_norm_keeps_the_values_and_others_parametrizations():
    model = Model()
    apply_norm(model, "spectral_norm", filter=lambda name, _: name != "head")
    parametrizations.orthogonal(model.head)
    model.eval()
    expected = {name: getattr(model.block, name).weight.detach().clone() for name in ("0", "2")}
    model.train()
    found = remove_norm(model)
    assert "block.0.weight" in found
    assert "head.weight" not in found
    assert parametrize.is_parametrized(model.head)
    for name, weight in expected.items():
        layer = getattr(model.block, name)
        assert isinstance(layer.weight, nn.Parameter)
        torch.testing.assert_close(layer.weight.detach(), weight)
    assert remove_norm(model) == []


def test_norms_on_top_of_other_parametrizations():
    layer = nn.Linear(4, 4)
    parametrizations.orthogonal(layer)
    spectral_norm(layer, bound=0.5, n_power_iterations=50)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_and_autocast(norm, dtype):
    torch.manual_seed(0)
    layer = norm(nn.Linear(64, 64)).eval()
    expected = layer.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)
    half = layer.to(dtype).weight
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert norm(nn.Linear(64, 64, dtype=dtype)).weight.dtype == dtype


def test_frozen_parameters(computed):
    deq, (z0, x) = pydeq.DEQ(Cell(weight_norm)).requires_grad_(False), inputs()
    computed.clear()
    assert not deq(z0, x).requires_grad
    assert len(computed) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: weight_norm(nn.Linear(2, 3), "kernel"), ValueError, r"Linear \(it has: weight, bias\), got 'kernel'"),
        (lambda: weight_norm("linear"), TypeError, "module must be a torch.nn.Module, got str"),
        (lambda: weight_norm(weight_norm(nn.Linear(2, 3))), ValueError, "weight of .*Linear is normalized already"),
        (lambda: spectral_norm(weight_norm(nn.Linear(2, 3))), ValueError, "is normalized already"),
        (lambda: weight_norm(nn.Linear(2, 3), dim=2), ValueError, r"shape \(3, 2\), got 2"),
        (lambda: weight_norm(nn.Linear(2, 3), dim=0.0), TypeError, "dim must be an int, got float"),
        (lambda: weight_norm(_zero()), ValueError, "weight must not be zero .*, along each index of dim 0"),
        (lambda: spectral_norm(nn.Linear(2, 3), "bias"), ValueError, r"two dimensions or more, got shape \(3,\)"),
        (lambda: spectral_norm(nn.Linear(2, 3), bound=0.0), ValueError, "bound must be greater than 0, got 0.0"),
        (lambda: spectral_norm(nn.Linear(2, 3), n_power_iterations=0), ValueError, "at least 1, got 0"),
        (lambda: spectral_norm(nn.Linear(2, 3), n_power_iterations=1.5), TypeError, "must be an int, got float"),
        (lambda: apply_norm(nn.Linear(2, 3), "layer_norm"), ValueError, "'spectral_norm', got 'layer_norm'"),
        (lambda: apply_norm(nn.GroupNorm(2, 4)), ValueError, "found none named weight"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def _zero():
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight[1] = 0.0
    return layer
