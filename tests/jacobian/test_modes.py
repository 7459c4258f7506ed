"""Modes of the penalty on the cells that people write: each is right, or raises an error that says what to use.

The reference takes J row by row in a float64 copy, and differentiates it by central differences of the exact value.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pydeq
from pydeq.jacobian import graphs, modes
from pydeq.jacobian.estimator import Estimator
from pydeq.state import layout_of

BATCH, CHANNELS, LENGTH = 3, 4, 6
MODES = ["vjp", "jvp", "difference", "auto"]


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr(modes, "_warned", set())
    monkeypatch.setattr(graphs, "_verdicts", {})


def randomized(module):
    """With parameters away from the ones and zeros that they start with."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


class Normed(nn.Module):
    """A cell norm(tanh(z W + x)) for states (batch, channels, length)."""

    def __init__(self, norm):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LENGTH, LENGTH) / LENGTH**0.5)
        self.norm = norm

    def forward(self, z, x):
        return self.norm(torch.tanh(z @ self.weight + x))


class Flat(nn.Module):
    """A norm of dimensions that the states have once they are reshaped."""

    def __init__(self, norm, *shape):
        super().__init__()
        self.norm, self.shape = norm, shape

    def forward(self, z):
        return self.norm(z.reshape(BATCH, *self.shape)).reshape(z.shape)


class Normalize(nn.Module):
    def forward(self, z):
        return functional.normalize(z, dim=1)


def norms():
    """Every norm of torch, affine or not, with running statistics or not, training or not."""
    for affine in (False, True):
        yield f"layer-{affine}", lambda affine=affine: nn.LayerNorm(LENGTH, elementwise_affine=affine)
        yield f"rms-{affine}", lambda affine=affine: nn.RMSNorm(LENGTH, elementwise_affine=affine)
        yield f"group-{affine}", lambda affine=affine: nn.GroupNorm(2, CHANNELS, affine=affine)
        for dims, shape in ((1, (4, 6)), (2, (4, 2, 3)), (3, (4, 1, 2, 3))):
            for kind in ("BatchNorm", "InstanceNorm"):
                for track in (False, True):
                    for training in (False, True):
                        if dims > 1 and affine != track:
                            continue

                        def make(kind=kind, dims=dims, shape=shape, affine=affine, track=track, training=training):
                            norm = getattr(nn, f"{kind}{dims}d")(CHANNELS, affine=affine, track_running_stats=track)
                            return Flat(norm, *shape).train(training)

                        yield f"{kind}{dims}d-{affine}-{track}-{training}", make
    yield "layer-no-bias", lambda: nn.LayerNorm(LENGTH, bias=False)
    yield "local-response", lambda: nn.LocalResponseNorm(3)
    yield "normalize", Normalize
    yield "weight", lambda: parametrizations.weight_norm(nn.Linear(LENGTH, LENGTH))
    yield "spectral", lambda: parametrizations.spectral_norm(nn.Linear(LENGTH, LENGTH)).eval()


NORMS = dict(norms())


def problem(cell, seed=0):
    torch.manual_seed(seed)
    cell = randomized(cell())
    if any(isinstance(part, nn.Module) and getattr(part, "running_var", None) is not None for part in cell.modules()):
        with torch.no_grad():
            for name, buffer in cell.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 1.5)
    return cell, *torch.randn(2, BATCH, CHANNELS, LENGTH, dtype=torch.float64)


def probes_of(options, z, count):

    return Estimator(probes=count).draw(layout_of(z), torch.Generator().manual_seed(options))


def value(cell, z, x, directions, from_right):
    """The squared norms of products with these vectors, from first derivatives; with no graph."""
    total = 0.0
    for v in directions:
        v = v.view_as(z)
        if from_right:
            h = 1e-5
            with torch.no_grad():
                product = (cell(z + h * v, x) - cell(z - h * v, x)) / (2 * h)
        else:
            leaf = z.clone().requires_grad_()
            (product,) = torch.autograd.grad(cell(leaf, x), leaf, v)
        total = total + product.square().sum() / len(directions)
    return float(total) / z.numel()


def along(cell, direction, step):
    """A copy with its parameters moved."""
    moved = copy.deepcopy(cell)
    with torch.no_grad():
        for parameter, by in zip(moved.parameters(), direction, strict=True):
            parameter.add_(step * by)
    return moved


def slope(cell, direction, of, step=1e-4):
    """The derivative of ``of`` along a direction of the parameters, by central differences of fourth order."""
    at = {k: of(along(cell, direction, k * step)) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)


def directions_of(cell):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in cell.parameters()]


def gradient_along(cell, penalty, direction):
    found = torch.autograd.grad(penalty, list(cell.parameters()), allow_unused=True, materialize_grads=True)
    return float(sum((g * d).sum() for g, d in zip(found, direction, strict=True)))


def outcome(mode, norm, penalty):
    """penalty(), or None for the one combination that raises, and says what to use."""
    if mode != "jvp" or not (norm.startswith("BatchNorm") and norm.endswith("-True-True")):
        return penalty()
    with pytest.raises(RuntimeError, match=r"changes buffers, like batch norm.*use mode='vjp' or 'difference'"):
        penalty()
    return None


@pytest.mark.filterwarnings("ignore:products with the Jacobian are formed one by one")  # group norm
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_in_every_mode_is_right_or_says_what_to_use(norm, mode):
    """Gradients of Hutchinson's estimate, for given probes."""
    cell, z, x = problem(lambda: Normed(NORMS[norm]()))
    direction, count = directions_of(cell), 2
    from_right = mode in ("jvp", "difference")
    probes = Estimator(probes=count).draw(layout_of(z), torch.Generator().manual_seed(3))
    options = {"order": 2, "step": 1e-4} if mode == "difference" else {}
    reference = copy.deepcopy(cell)
    options |= {"mode": mode, "probes": count, "generator": torch.Generator().manual_seed(3)}
    penalty = outcome(mode, norm, lambda: pydeq.jacobian_penalty(cell, z, x, **options))
    if penalty is None:
        return
    expected = value(reference, z, x, probes, from_right)
    torch.testing.assert_close(float(penalty.detach()), expected, rtol=1e-6, atol=1e-9)
    wanted = slope(reference, direction, lambda moved: value(moved, z, x, probes, from_right))
    actual = gradient_along(cell, penalty, direction)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def couples_samples(norm):
    return norm.startswith("BatchNorm") and (norm.endswith("-True") or norm.split("-")[2] == "False")


@functools.cache
def exact_of(norm):
    """The exact penalty and its derivative along ``directions_of``."""
    cell, z, x = problem(lambda: Normed(NORMS[norm]()))
    size = CHANNELS * LENGTH
    unit = torch.eye(size, dtype=torch.float64)[:, None].expand(size, BATCH, size)
    of = lambda moved: size * value(moved, z, x, unit, False)  # noqa: E731
    return of(copy.deepcopy(cell)), slope(cell, directions_of(cell), of)


@pytest.mark.filterwarnings("ignore:products with the Jacobian are formed one by one")
@pytest.mark.parametrize(
    ("mode", "method"),  # mode "auto" takes "vjp" for norms, and method "exact" in mode "jvp" the rows of mode "vjp"
    [("vjp", "hutch++"), ("jvp", "hutch++"), ("difference", "hutch++"), ("vjp", "exact"), ("difference", "exact")],
)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if not couples_samples(norm)])
def test_every_norm_by_hutch_plus_plus_and_exactly(norm, mode, method):
    """Hutch++ with a basis of all directions is exact, too."""
    cell, z, x = problem(lambda: Normed(NORMS[norm]()))
    direction = directions_of(cell)
    expected, wanted = exact_of(norm)
    options = {"order": 2, "step": 1e-4} if mode == "difference" else {}
    options |= {"mode": mode, "method": method, "probes": 3 * CHANNELS * LENGTH}
    penalty = outcome(mode, norm, lambda: pydeq.jacobian_penalty(cell, z, x, **options))
    if penalty is None:
        return
    torch.testing.assert_close(float(penalty.detach()), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient_along(cell, penalty, direction), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["vjp", "jvp", "difference"])
def test_coupled_samples_by_hutch_plus_plus_are_unbiased_and_exactly_refused(mode):
    """Batch statistics: J is that of all samples together."""
    cell, z, x = problem(lambda: Normed(NORMS["BatchNorm1d-True-False-True"]()))
    direction, size = directions_of(cell), z.numel()
    unit = torch.eye(size, dtype=torch.float64).view(size, *z.shape)
    of = lambda moved: size * value(moved, z, x, unit, False)  # noqa: E731
    expected = torch.tensor([of(copy.deepcopy(cell)), slope(cell, direction, of)])
    options = {"order": 2, "step": 1e-4} if mode == "difference" else {}
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(150):
        penalty = pydeq.jacobian_penalty(
            cell, z, x, mode=mode, method="hutch++", probes=9, generator=generator, **options
        )
        found.append(torch.tensor([float(penalty.detach()), gradient_along(cell, penalty, direction)]))
    found = torch.stack(found)
    assert ((found.mean(0) - expected).abs() < 5 * found.std(0) / len(found) ** 0.5).all()
    assert (found.std(0) < 0.5 * expected.abs()).all()
    with pytest.raises(ValueError, match=r"batch norm in training mode does that\): use method='hutchinson'"):
        pydeq.jacobian_penalty(cell, z, x, mode=mode, method="exact", **options)


def gradients_of(fn, parameters, mode, **options):
    z, x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    value = pydeq.jacobian_penalty(fn, z, x, mode=mode, generator=generator, **options)
    return value.detach(), torch.autograd.grad(value, parameters)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_a_gated_linear_unit_in_forward_mode(dim, method):
    """The same probes as of a unit that is written out."""
    linear = nn.Linear(4, 8).double()

    def fn(z, x, unit):
        return unit(linear(z), dim) + x

    def written(y, dim):
        value, gate = y.chunk(2, dim)
        return value / (1.0 + torch.exp(-gate))

    units = functional.glu, lambda y, dim: nn.GLU(dim)(y), written
    options = {"method": method, "probes": 3}
    found, module, expected = (
        gradients_of(lambda z, x, unit=unit: fn(z, x, unit), list(linear.parameters()), "jvp", **options)
        for unit in units
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module, expected)


def test_forward_mode_that_cannot_be_differentiated_says_what_to_use():
    linear = nn.Linear(4, 8).double()

    def fn(z, x):
        return torch.ops.aten.glu(linear(z)) + x  # which pydeq does not put plain operations in place of

    with pytest.raises(RuntimeError, match=r"derivative cannot be differentiated: use mode='vjp' or 'difference'"):
        gradients_of(fn, list(linear.parameters()), "jvp")
    with torch.no_grad():
        value = pydeq.jacobian_penalty(fn, torch.zeros(3, 4).double(), torch.zeros(3, 4).double(), mode="jvp")
    assert value > 0
    found, expected = (
        gradients_of(of, list(linear.parameters()), "vjp") for of in (fn, lambda z, x: functional.glu(linear(z)) + x)
    )
    torch.testing.assert_close(found, expected)


def test_checkpoints_in_forward_mode_say_what_to_use():
    linear = nn.Linear(4, 4).double()

    def plain(z, x):
        return torch.tanh(linear(z)) + x

    def checkpointed(z, x):
        return checkpoint(plain, z, x, use_reentrant=False)

    def offloaded(z, x):
        with torch.autograd.graph.save_on_cpu():
            return plain(z, x)

    parameters = list(linear.parameters())
    with pytest.raises(RuntimeError, match=r"uses torch\.utils\.checkpoint, .*: use mode='vjp' or 'difference'"):
        gradients_of(checkpointed, parameters, "jvp")
    for mode in ("vjp", "difference"):
        torch.testing.assert_close(gradients_of(checkpointed, parameters, mode), gradients_of(plain, parameters, mode))
    # Hooks that do not evaluate again are right, and so is a checkpoint around the penalty.
    expected = gradients_of(plain, parameters, "jvp")
    torch.testing.assert_close(gradients_of(offloaded, parameters, "jvp"), expected)
    value, found = gradients_of(plain, parameters, "jvp")
    z, x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def whole(z):
        return pydeq.jacobian_penalty(plain, z, x, mode="jvp", generator=torch.Generator().manual_seed(7))

    around = checkpoint(whole, z.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close((around.detach(), torch.autograd.grad(around, parameters)), (value, found))
