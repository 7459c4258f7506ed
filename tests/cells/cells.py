"""A list of the kinds of cells that people put into a DEQ, each in a few lines.

``CELLS`` has a case for each kind. ``case.build()`` makes a small, seeded cell, an initial state and a context::

    for case in CELLS:
        cell, z0, context = case.build(torch.float64)
        z = pydeq.DEQ(cell)(z0, *context)

Every cell has a fixed point that Anderson's method finds to 1e-10 within 100 evaluations in float64. A cell treats
samples independently and can be differentiated twice, unless its case says otherwise. The last argument of a context is
x, which enters the whole state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import pydeq

BATCH, TOKENS, WIDTH = 2, 4, 8


class Example(NamedTuple):
    """A cell, an initial state and the context that the cell gets."""

    cell: Any
    z0: Any
    context: tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One cell.

    Args:
        name: What a user would call it; docs/cells.md has the same name.
        make: () -> (cell, z0, context), float32, drawn from torch's generator.
        twice: Whether torch differentiates it twice on a CPU. False if an operator has no second derivative there.
        couples: Whether samples depend on each other.
        state: The type of the state: "tensor", "tuple", "namedtuple", "dict", "list" or "nested".
        has_aux: Whether the cell returns a pair of the state and something else.
        closure: Whether it is a function that captures its parameters, which torch.func cannot reach then.
    """

    name: str
    make: Callable[[], tuple[Any, Any, tuple[Any, ...]]]
    twice: bool = True
    couples: bool = False
    state: str = "tensor"
    has_aux: bool = False
    closure: bool = False

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Example:
        """Build the cell, with parameters, state and context in ``dtype``; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cell, z0, context = self.make()

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        if isinstance(cell, nn.Module):
            cell = cell.to(dtype)
        z0, context = tree_map_only(Tensor, cast, (z0, context))
        return Example(cell, z0, context)

    def __str__(self) -> str:
        return self.name


CELLS: list[Case] = []


def case(name: str, **properties: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Decorator that adds a case for the function's result to the list."""

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        CELLS.append(Case(name, make, **properties))
        return make

    return add


def zeros(*shape: int) -> Tensor:
    return torch.zeros(BATCH, *shape)


def draw(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape)


class Map(nn.Module):
    """A cell made of a function of (modules, z, *context) and the modules that it uses."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, z: Any, *context: Any) -> Any:
        return self.function(self, z, *context)


def tokens() -> tuple[Tensor, tuple[Tensor]]:
    """A state of BATCH sequences, and its x."""
    return zeros(TOKENS, WIDTH), (draw(TOKENS, WIDTH),)


def vectors() -> tuple[Tensor, tuple[Tensor]]:
    return zeros(WIDTH), (draw(WIDTH),)


def images() -> tuple[Tensor, tuple[Tensor]]:
    return zeros(4, 5, 5), (draw(4, 5, 5),)


# Layers of vectors


@case("tanh(W z + x)")
def tanh():
    return Map(lambda m, z, x: torch.tanh(m.linear(z) + x), linear=nn.Linear(WIDTH, WIDTH)), *vectors()


@case("a perceptron with GELU and a residual")
def perceptron():
    layers = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    return Map(lambda m, z, x: 0.5 * z + m.layers(z) + x, layers=layers), *vectors()


@case("ReLU in place")
def relu_in_place():
    def cell(m, z, x):
        return F.relu(m.linear(z).add_(x), inplace=True)

    return Map(cell, linear=nn.Linear(WIDTH, WIDTH)), *vectors()


@case("a function that captures its parameters", closure=True)
def closure():
    weight, bias = 0.2 * torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)

    def cell(z, x):
        w, b = weight.to(z.dtype), bias.to(z.dtype)
        return torch.tanh(z @ w + b + x)

    return cell, *vectors()


@case("a gated linear unit, torch.einsum and an outer product")
def gated():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(WIDTH, WIDTH, WIDTH))
            self.gate = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, z, x):
            bilinear = torch.einsum("bi,ijk,bj->bk", torch.tanh(z), self.weight, torch.tanh(x))
            return bilinear + F.glu(self.gate(z)) + x

    return Gated(), *vectors()


@case("a monotone operator: (1 - m) I - A^T A + B - B^T")
def monotone():
    class Monotone(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH))
            self.b = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH))

        def forward(self, z, x):
            w = 0.5 * torch.eye(WIDTH, dtype=z.dtype) - self.a.T @ self.a + self.b - self.b.T
            return F.relu(0.7 * z + 0.3 * (z @ w.T + x))

    return Monotone(), *vectors()


# Attention


@case("nn.MultiheadAttention", twice=False)
def multihead_attention():
    def cell(m, z, x):
        h = m.norm(z + x)
        return x + m.attention(h, h, h, need_weights=False)[0]

    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    return Map(cell, attention=attention, norm=nn.LayerNorm(WIDTH)), *tokens()


@case("nn.TransformerEncoderLayer", twice=False)
def encoder_layer():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    return Map(lambda m, z, x: m.layer(0.5 * z + x), layer=layer), *tokens()


@case("nn.TransformerDecoderLayer with a memory", twice=False)
def decoder_layer():
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    z0, (x,) = tokens()
    return Map(lambda m, z, memory, x: 0.3 * m.layer(z, memory) + x, layer=layer), z0, (draw(3, WIDTH), x)


class SelfAttention(nn.Module):
    """Attention by F.scaled_dot_product_attention."""

    def __init__(self, heads: int = 2, key_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        size = WIDTH // heads
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, size * key_heads), nn.Linear(WIDTH, size * key_heads)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, **options: Any) -> Tensor:
        q, k, v = (
            part(h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, heads in ((self.query, self.heads), (self.key, self.key_heads), (self.value, self.key_heads))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))


@case("F.scaled_dot_product_attention, causal", twice=False)
def causal_attention():
    def cell(m, z, x):
        return x + m.attention(m.norm(z), is_causal=True)

    return Map(cell, attention=SelfAttention(), norm=nn.LayerNorm(WIDTH)), *tokens()


@case("F.scaled_dot_product_attention with a padding mask", twice=False)
def masked_attention():
    def cell(m, z, mask, x):
        return x + m.attention(m.norm(z), attn_mask=mask[:, None, None, :])

    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, -1] = False
    z0, (x,) = tokens()
    return Map(cell, attention=SelfAttention(), norm=nn.LayerNorm(WIDTH)), z0, (mask, x)


@case("attention with fewer heads for keys (GQA)", twice=False)
def grouped_attention():
    def cell(m, z, x):
        return x + m.attention(m.norm(z), is_causal=True, enable_gqa=True)

    return Map(cell, attention=SelfAttention(4, 2), norm=nn.LayerNorm(WIDTH)), *tokens()


@case("attention written out, with rotary positions and QK norm")
def written_attention():
    def rotate(h):
        angle = torch.arange(TOKENS, dtype=h.dtype)[:, None] / 10.0 ** torch.arange(0, 2, dtype=h.dtype)
        a, b = h.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)

    def cell(m, z, x):
        q, k, v = m.project(z).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, dim=1)
        q, k = rotate(F.normalize(q, dim=-1)), rotate(F.normalize(k, dim=-1))
        weights = torch.softmax(2.0 * q @ k.transpose(-1, -2), dim=-1)
        return x + m.out((weights @ v).transpose(1, 2).flatten(2))

    return Map(cell, project=nn.Linear(WIDTH, 3 * WIDTH), out=nn.Linear(WIDTH, WIDTH)), *tokens()


@case("a looped transformer's block: sandwiched RMSNorm, SwiGLU, input by an adapter", twice=False)
def looped_transformer():
    def cell(m, s, x):
        h = m.adapter(torch.cat([0.5 * s, x], dim=-1))
        h = m.norms[1](h + m.attention(m.norms[0](h), is_causal=True))
        gate, value = m.inner(m.norms[2](h)).chunk(2, dim=-1)
        return 0.7 * m.norms[3](h + m.outer(F.silu(gate) * value))

    modules = {
        "adapter": nn.Linear(2 * WIDTH, WIDTH),
        "norms": nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4)),
        "attention": SelfAttention(),
        "inner": nn.Linear(WIDTH, 4 * WIDTH),
        "outer": nn.Linear(2 * WIDTH, WIDTH),
    }
    return Map(cell, **modules), *tokens()


@case("RMSNorm and SwiGLU")
def swiglu():
    def cell(m, z, x):
        gate, value = m.inner(m.norm(z + x)).chunk(2, dim=-1)
        return x + m.outer(F.silu(gate) * value)

    modules = {"norm": nn.RMSNorm(WIDTH), "inner": nn.Linear(WIDTH, 4 * WIDTH), "outer": nn.Linear(2 * WIDTH, WIDTH)}
    return Map(cell, **modules), *tokens()


@case("LayerNorm after a perceptron")
def layer_norm():
    def cell(m, z, x):
        return m.norm(0.5 * z + F.gelu(m.linear(z)) + x)

    return Map(cell, norm=nn.LayerNorm(WIDTH), linear=nn.Linear(WIDTH, WIDTH)), *tokens()


@case("a mixture of experts, the best two for each token")
def experts():
    def cell(m, z, x):
        # x decides the routing: if z did, the map would not be continuous.
        weights, best = torch.softmax(m.router(x), dim=-1).topk(2, dim=-1)
        every = torch.stack([torch.tanh(expert(z)) for expert in m.experts], dim=-2)
        chosen = every.gather(-2, best[..., None].expand(*best.shape, WIDTH))
        return x + (weights[..., None] * chosen).sum(-2)

    modules = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    return Map(cell, router=nn.Linear(WIDTH, 3), experts=modules), *tokens()


# Convolutions and their norms


def residual_block(norm: Callable[[], nn.Module]) -> nn.Module:
    """norm(relu(z + norm(conv(norm(relu(conv(z))) + x)))), a layer of an MDEQ."""

    def cell(m, z, x):
        h = m.norms[0](F.relu(m.first(z)))
        h = m.norms[1](0.3 * m.second(h) + x)
        return m.norms[2](F.relu(0.2 * z + h))

    convolutions = {name: nn.Conv2d(4, 4, 3, padding=1) for name in ("first", "second")}
    return Map(cell, **convolutions, norms=nn.ModuleList(norm() for _ in range(3)))


@case("convolutions with GroupNorm")
def group_norm():
    return residual_block(lambda: nn.GroupNorm(2, 4)), *images()


@case("convolutions with InstanceNorm")
def instance_norm():
    return residual_block(lambda: nn.InstanceNorm2d(4, affine=True)), *images()


@case("convolutions with BatchNorm in training mode", couples=True)
def batch_norm():
    return residual_block(lambda: nn.BatchNorm2d(4)).train(), *images()


@case("convolutions with BatchNorm in evaluation mode")
def batch_norm_evaluated():
    cell = residual_block(lambda: nn.BatchNorm2d(4))
    with torch.no_grad():
        for _ in range(20):
            cell(draw(4, 5, 5), draw(4, 5, 5))
    return cell.eval(), *images()


@case("a depthwise convolution, pooling, interpolation and a transposed convolution")
def scales():
    def cell(m, z, x):
        coarse = F.relu(m.down(F.pad(z, (0, 1, 0, 1))))
        up = F.interpolate(m.up(F.avg_pool2d(coarse, 1)), size=(5, 5), mode="bilinear", align_corners=False)
        return x + 0.5 * torch.tanh(m.depthwise(z) + up)

    modules = {
        "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "down": nn.Conv2d(4, 8, 2, stride=2),
        "up": nn.ConvTranspose2d(8, 4, 2, stride=2),
    }
    return Map(cell, **modules), *images()


@case("a convolutional GRU")
def convolutional_gru():
    def cell(m, h, x):
        hx = torch.cat([h, x], dim=1)
        update, reset = torch.sigmoid(m.gates(hx)).chunk(2, dim=1)
        new = torch.tanh(m.new(torch.cat([reset * h, x], dim=1)))
        return (1 - update) * h + update * new

    return Map(cell, gates=nn.Conv2d(8, 8, 3, padding=1), new=nn.Conv2d(8, 4, 3, padding=1)), *images()


@case("a proximal gradient step with a denoiser")
def proximal_gradient():
    def cell(m, z, y):
        gradient = m.blur(z) - y
        z = z - 0.5 * F.conv_transpose2d(gradient, m.blur.weight, padding=1, groups=4)
        return z - 0.3 * m.denoiser(z)

    blur = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    nn.init.constant_(blur.weight, 0.05)
    blur.weight.data[:, :, 1, 1] = 0.8
    denoiser = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    return Map(cell, blur=blur, denoiser=denoiser), *images()


@case("a Fourier layer")
def fourier():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.real = nn.Parameter(0.3 * torch.randn(4, 4, 3))
            self.imaginary = nn.Parameter(0.3 * torch.randn(4, 4, 3))

        def forward(self, z, x):
            spectrum = torch.fft.rfft(z, norm="ortho")[..., :3]
            low = torch.einsum("bim,iom->bom", spectrum, torch.complex(self.real, self.imaginary))
            return torch.tanh(0.5 * torch.fft.irfft(low, n=9, norm="ortho") + x)

    return Fourier(), zeros(4, 9), (draw(4, 9),)


# Parametrizations


@case("weight norm (torch.nn.utils.parametrizations)")
def weight_norm():
    linear = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    return Map(lambda m, z, x: torch.tanh(0.7 * m.linear(z) + x), linear=linear), *vectors()


@case("weight norm (torch.nn.utils, by a hook)")
def hooked_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and everywhere
        linear = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
    return Map(lambda m, z, x: torch.tanh(0.7 * m.linear(z) + x), linear=linear), *vectors()


@case("spectral norm (torch.nn.utils.parametrizations) in evaluation mode")
def spectral_norm():
    linear = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH), n_power_iterations=5)
    return Map(lambda m, z, x: torch.tanh(0.7 * m.linear(z) + x), linear=linear).eval(), *vectors()


@case("orthogonal weights (torch.nn.utils.parametrizations)")
def orthogonal():
    linear = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))
    return Map(lambda m, z, x: torch.tanh(0.7 * m.linear(z) + x), linear=linear), *vectors()


@case("pydeq.nn's weight norm and spectral norm")
def scoped_norms():
    first = pydeq.nn.weight_norm(nn.Linear(WIDTH, WIDTH))
    second = pydeq.nn.spectral_norm(nn.Linear(WIDTH, WIDTH))
    cell = Map(lambda m, z, x: m.second(torch.tanh(0.7 * m.first(z) + x)), first=first, second=second)
    return cell.eval(), *vectors()


# Recurrent cells


@case("nn.GRUCell")
def gru_cell():
    return Map(lambda m, h, x: m.gru(x, h), gru=nn.GRUCell(WIDTH, WIDTH)), *vectors()


@case("nn.LSTMCell, a tuple of states", state="tuple")
def lstm_cell():
    cell = Map(lambda m, hc, x: m.lstm(x, hc), lstm=nn.LSTMCell(WIDTH, WIDTH))
    return cell, (zeros(WIDTH), zeros(WIDTH)), (draw(WIDTH),)


@case("nn.LSTM along a sequence")
def lstm():
    lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
    return Map(lambda m, z, x: m.lstm(0.5 * z + x)[0], lstm=lstm), *tokens()


@case("nn.GRU along a sequence")
def gru():
    gru = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
    return Map(lambda m, z, x: m.gru(0.5 * z + x)[0], gru=gru), *tokens()


# Embeddings, graphs and sparse matrices


@case("nn.Embedding with padding")
def embedding():
    def cell(m, z, ids, x):
        return torch.tanh(m.linear(z) + m.embedding(ids).sum(1) + x)

    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    z0, (x,) = vectors()
    return Map(cell, linear=nn.Linear(WIDTH, WIDTH), embedding=nn.Embedding(6, WIDTH, padding_idx=0)), z0, (ids, x)


NODES = 5
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])  # from, to


@case("messages along edges by index_add, a graph as one sample")
def index_add():
    def cell(m, z, edges, x):
        source, target = edges
        messages = torch.tanh(m.message(z[:, source]))
        return x + 0.5 * torch.zeros_like(z).index_add(1, target, messages)

    return Map(cell, message=nn.Linear(WIDTH, WIDTH)), zeros(NODES, WIDTH), (EDGES, draw(NODES, WIDTH))


@case("graph attention by scatter, a graph as one sample")
def graph_attention():
    def cell(m, z, edges, x):
        source, target = edges
        scores = m.score(torch.cat([z[:, source], z[:, target]], dim=-1)).exp()
        index = target[None, :, None].expand_as(scores)
        total = torch.zeros_like(scores[:, :NODES]).scatter_add(1, index, scores)
        weighed = scores / total.gather(1, index) * m.message(z[:, source])
        summed = torch.zeros_like(z).scatter_reduce(1, index.expand_as(weighed), weighed, "sum")
        return torch.tanh(summed + x)

    modules = {"score": nn.Linear(2 * WIDTH, 1), "message": nn.Linear(WIDTH, WIDTH)}
    return Map(cell, **modules), zeros(NODES, WIDTH), (EDGES, draw(NODES, WIDTH))


@case("a sparse matrix, the nodes of one graph as the batch", couples=True)
def sparse():
    def cell(m, z, x):
        return torch.tanh(torch.sparse.mm(m.adjacency, m.linear(z)) + x)

    values = torch.full((EDGES.shape[1],), 0.5)
    model = Map(cell, linear=nn.Linear(WIDTH, WIDTH))
    adjacency = torch.sparse_coo_tensor(EDGES.flip(0), values, (NODES, NODES), check_invariants=True)
    model.register_buffer("adjacency", adjacency.coalesce())
    return model, torch.zeros(NODES, WIDTH), (torch.randn(NODES, WIDTH),)


# What torch can do inside a cell


@case("torch.utils.checkpoint inside")
def checkpointed():
    def cell(m, z, x):
        return torch.tanh(checkpoint(m.layers, z, use_reentrant=False) + x)

    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    return Map(cell, layers=layers), *vectors()


class Softsign(Function):
    """A function with its own derivative, which torch can differentiate again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] / (1 + x.abs()).square()


class OnceSoftsign(Function):
    """The same function, differentiable once, as most bindings of kernels are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] / (1 + x.abs()).square()


@case("a custom autograd.Function")
def custom_function():
    return Map(lambda m, z, x: Softsign.apply(m.linear(z) + x), linear=nn.Linear(WIDTH, WIDTH)), *vectors()


@case("a custom autograd.Function that is once_differentiable", twice=False)
def once_function():
    return Map(lambda m, z, x: OnceSoftsign.apply(m.linear(z) + x), linear=nn.Linear(WIDTH, WIDTH)), *vectors()


@case("a part in TorchScript")
def scripted():
    layers = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    return Map(lambda m, z, x: 0.7 * m.layers(z) + x, layers=layers), *vectors()


@case("another DEQ inside")
def nested():
    inner = Map(lambda m, z, x: torch.tanh(m.linear(z) + x), linear=nn.Linear(WIDTH, WIDTH))
    exact = {"rtol": 1e-12, "max_steps": 200}
    deq = pydeq.DEQ(inner, solver=pydeq.Broyden(), adjoint=pydeq.Implicit(pydeq.Broyden(), **exact), **exact)
    return Map(lambda m, z, x: 0.5 * m.deq(torch.zeros_like(z), 0.5 * z) + x, deq=deq), *vectors()


@case("the gradient of an energy, by torch.func.grad")
def energy():
    def cell(m, z, x):
        def of(z):
            return F.softplus(m.linear(z)).sum() + 0.5 * (z - x).square().sum()

        return z - 0.3 * torch.func.grad(of)(z)

    return Map(cell, linear=nn.Linear(WIDTH, WIDTH)), *vectors()


@case("the gradient of an energy, by torch.autograd.grad")
def autograd_energy():
    def cell(m, z, x):
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            at = z if z.requires_grad else z.detach().clone().requires_grad_()
            value = F.softplus(m.linear(at)).sum() + 0.5 * (at - x).square().sum()
            (gradient,) = torch.autograd.grad(value, at, create_graph=graph)
        return z - 0.3 * gradient

    return Map(cell, linear=nn.Linear(WIDTH, WIDTH)), *vectors()


@case("an implicit layer inside: a linear system")
def linear_system():
    def cell(m, z, x):
        matrix = torch.diag_embed(1.0 + torch.sigmoid(z)) + 0.1 * torch.tanh(m.linear(z))[:, :, None]
        return torch.linalg.solve(matrix, x[:, :, None])[:, :, 0]

    return Map(cell, linear=nn.Linear(WIDTH, WIDTH)), *vectors()


# States that are not a tensor


@case("two resolutions, a tuple", state="tuple")
def two_resolutions():
    def cell(m, z, x):
        fine, coarse = z
        mixed = fine + F.interpolate(m.up(coarse), size=5)
        return (
            x + 0.4 * torch.tanh(m.fine(mixed)),
            0.4 * torch.tanh(m.coarse(coarse) + m.down(mixed)),
        )

    modules = {
        "fine": nn.Conv2d(4, 4, 3, padding=1),
        "coarse": nn.Conv2d(6, 6, 3, padding=1),
        "up": nn.Conv2d(6, 4, 1),
        "down": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    }
    return Map(cell, **modules), (zeros(4, 5, 5), zeros(6, 3, 3)), (draw(4, 5, 5),)


class Recurrence(NamedTuple):
    """A hidden state and a field that it moves, as in optical flow."""

    hidden: Tensor
    flow: Tensor


@case("a hidden state and a flow, a namedtuple", state="namedtuple")
def flow():
    def cell(m, state, x):
        hidden = torch.tanh(m.hidden(torch.cat([state.hidden, state.flow], dim=-1)) + x)
        return Recurrence(hidden, 0.5 * state.flow + 0.3 * m.flow(hidden))

    modules = {"hidden": nn.Linear(WIDTH + 2, WIDTH), "flow": nn.Linear(WIDTH, 2)}
    return Map(cell, **modules), Recurrence(zeros(WIDTH), zeros(2)), (draw(WIDTH),)


@case("nodes and edges, a dict", state="dict")
def message_passing():
    def cell(m, z, x):
        pairs = torch.cat([z["nodes"][:, EDGES[0]], z["nodes"][:, EDGES[1]], z["edges"]], dim=-1)
        edges = torch.tanh(m.edges(pairs))
        nodes = x + 0.3 * torch.zeros_like(z["nodes"]).index_add(1, EDGES[1], m.nodes(edges))
        return {"nodes": nodes, "edges": edges}

    modules = {"edges": nn.Linear(2 * WIDTH + 3, 3), "nodes": nn.Linear(3, WIDTH)}
    z0 = {"nodes": zeros(NODES, WIDTH), "edges": zeros(EDGES.shape[1], 3)}
    return Map(cell, **modules), z0, (draw(NODES, WIDTH),)


@case("two streams, a list", state="list")
def streams():
    def cell(m, z, x):
        return [torch.tanh(m.first(z[1]) + x), 0.5 * torch.tanh(m.second(z[0]))]

    modules = {"first": nn.Linear(WIDTH, WIDTH), "second": nn.Linear(WIDTH, WIDTH)}
    return Map(cell, **modules), [zeros(WIDTH), zeros(WIDTH)], (draw(WIDTH),)


@case("stacked LSTM cells, a tuple in a dict", state="nested")
def stacked():
    def cell(m, z, x):
        first = m.first(x, z["first"])
        return {"first": first, "second": (m.second(torch.cat([first[0], z["second"][0]], dim=-1), z["second"][0]),)}

    modules = {"first": nn.LSTMCell(WIDTH, WIDTH), "second": nn.GRUCell(2 * WIDTH, WIDTH)}
    z0 = {"first": (zeros(WIDTH), zeros(WIDTH)), "second": (zeros(WIDTH),)}
    return Map(cell, **modules), z0, (draw(WIDTH),)


@case("a cell that also returns its attention map", has_aux=True)
def with_attention_map():
    def cell(m, z, x):
        h, weights = m.attention(z, z, z)
        return x + h, weights

    return Map(cell, attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True)), *tokens()
