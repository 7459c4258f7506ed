"""``record`` the arguments of a solve's steps, then ``check_op`` that an operation does what its reference does there.

    check_op(OP, picard_step.reference, record(Picard(), lambda z, k: z / 2 + 1, torch.zeros(1, 1), 3))

By hand: from z = 0 Picard's iteration of z / 2 + 1 takes three steps, so ``record`` returns three samples. Each has the
arguments as they were before that step; ``next`` still holds the previous iterate.

    sample   z     f      next           the step must leave in next
    0        0     1      -              1
    1        1     1.5    0              1.5
    2        1.5   1.75   1              the best iterate, 1.5: it is the last step

``check_op`` gives operation and reference a copy of each sample and compares all arguments afterwards. So rounding does
not add up over steps. Buffers that a solver allocates without filling them hold NaN here, so a kernel that reads them
is found out.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pydeq.ops import kernels
from pydeq.ops.constants import RUNNING, Counter, Status
from pydeq.ops.termination import Rules
from pydeq.testing import tolerance

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# One entry; either side of 32 lanes and of a chunk of 4096; several chunks with a remainder.
SIZES = (1, 31, 32, 33, 4095, 4096, 4097, 9000)

# Squares of these over- or underflow, or nearly do.
SCALES = (
    (torch.float32, 1e-30),
    (torch.float32, 1e-18),
    (torch.float32, 1e18),
    (torch.float32, 1e30),
    (torch.float64, 1e-200),
    (torch.float64, 1e200),
    (torch.float16, 1e-3),
    (torch.bfloat16, 1e30),
)

UNFILLED = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)
OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def check_op(
    op: torch._ops.OpOverload,
    reference: Callable,
    samples: Iterable[Sequence],
    allowance: Callable[[dict, dict], dict] = lambda before, after: {},
    opcheck: Sequence[int] = (),
) -> None:
    """Check on each sample that ``op`` writes and returns the same as ``reference``.

    All instruction sets are run, and must compute the same bits.

    Args:
        samples: The arguments of one call each.
        allowance: allowance(before, after) returns the absolute errors allowed, by argument; "return" is the returned
            value. ``before`` and ``after`` are the arguments by name before the call and as the reference leaves them.
            An error is a tensor that broadcasts with the argument, infinite where the argument is not read again.
            Arguments without an allowance must be the same to the last bit.
        opcheck: Indices of samples for torch.library.opcheck: schema, fake kernel, autograd registration, tracing.
    """
    samples = list(samples)
    names = [argument.name for argument in op._schema.arguments]
    for index, sample in enumerate(samples):
        expected = run(reference, names, sample)
        allowed = {}  # the reference against itself, where no kernels are loaded
        if kernels.kernels().cpu:
            allowed = allowance(dict(zip(names, sample, strict=True)), expected)
        first = None
        for isa, actual in on_each_instruction_set(lambda sample=sample: run(op, names, sample)):
            for name, want in expected.items():
                compare(f"sample {index}, {isa}, {name}", actual[name], want, allowed.get(name, 0.0))
            first = first or actual
            for name, want in first.items():
                compare(f"sample {index}, {isa} against the plainest, {name}", actual[name], want, 0.0)
    for index in opcheck:
        torch.library.opcheck(op, copy(tuple(samples[index])), test_utils=OPCHECKS)


def run(function: Callable, names: Sequence[str], sample: Sequence) -> dict:
    """Call ``function`` on a copy of the arguments; return them by name as it left them, and "return"."""
    arguments = copy(tuple(sample))
    with torch.no_grad():
        result = function(*arguments)
    return {**dict(zip(names, arguments, strict=True)), "return": result}


def copy(arguments: tuple) -> tuple:
    return tree_map_only(Tensor, torch.clone, arguments)


def on_each_instruction_set(function: Callable):
    """Yield (name, function()) for each instruction set, the best one last; once where the references run."""
    active = kernels.kernels().instruction_set
    try:
        for isa in kernels.supported_instruction_sets() or (None,):
            if isa:
                kernels.select_instruction_set(isa)
            yield isa or "reference", function()
    finally:
        if active:
            kernels.select_instruction_set(active)


def compare(where: str, actual, expected, allowed) -> None:
    if isinstance(expected, list | tuple):
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            compare(f"{where}[{i}]", one, other, allowed[i] if isinstance(allowed, list) else allowed)
    elif isinstance(expected, Tensor):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), where
        got, want = actual.double(), expected.double()
        same = (want == got) | (want.isnan() & got.isnan()) | torch.as_tensor(allowed == torch.inf)
        excess = torch.where(same, 0.0, (want - got).abs() - allowed)
        wrong = ~(excess <= 0)
        assert not wrong.any(), (
            f"{where}: {int(wrong.sum())} of {want.numel()} entries are off, at {wrong.nonzero()[0].tolist()}"
            f" {float(got[wrong][0])!r} instead of {float(want[wrong][0])!r}, worst beyond its allowance by"
            f" {float(excess[wrong].max()):.3g}"
        )
    else:
        assert actual == expected, where


def bits(x: Tensor) -> Tensor:
    """Return a tensor's bytes: unlike entries, equal NaNs have equal bytes."""
    return x.reshape(-1).view(torch.uint8)


class Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of each of pydeq's operations before it runs, and fills new buffers with NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pydeq":
            self.samples.append(copy(args))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in UNFILLED and result.is_floating_point():
            result.fill_(torch.nan)
        return result


def record(solver, fn: Callable, z0: Tensor, max_steps: int, **rules) -> list[tuple]:
    """Return the arguments of ``max_steps`` steps of ``solver`` on fn(z, k), with the step k, from ``z0`` [B, D].

    Args:
        rules: Of :class:`pydeq.ops.termination.Rules`; a small rtol, freezing and stalling unless given.
    """
    eps = torch.finfo(z0.dtype).eps
    settings = Rules(**{"rtol": 4 * eps, "atol": 0.0, "eps": eps, "freeze": True, "stall": True, **rules})
    with torch.no_grad(), Recorder() as recorder:
        workspace = solver.start(z0, settings, max_steps)
        for k in range(max_steps):
            workspace.step(fn(workspace.z[k % 2], k), k)
    return recorder.samples


def mixed_map(batch: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Callable, Tensor]:
    """A map under which samples fare differently, as fn(z, k) with the step k, and initial iterates [B, D].

    Sample b, by b modulo 7: 0 converges slowly, 1 at once, 2 after a few steps, 3 meets NaN at step 4, 4 meets Inf at
    steps 3 and 7, 5 has a residual that grows until it has diverged, and 6 is at a fixed point at step 5 and no longer
    at step 6.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(batch)[:, None] % 7
    scale = torch.rand(dim, generator=generator, dtype=torch.float64) * 0.7 + 0.2
    rate = torch.where(kind == 2, 0.01, scale)
    rate, x, first = (
        y.to(dtype) for y in (rate, *torch.randn(2, batch, dim, generator=generator, dtype=torch.float64))
    )

    def fn(z: Tensor, k: int) -> Tensor:
        image = rate * torch.sin(z.roll(1, 1)) + x
        image = torch.where(kind == 5, z + 30.0**k * first, image)
        image = torch.where((kind == 1) | ((kind == 6) & (k == 5)), z, image)
        image[:, :1] = torch.where((kind == 3) & (k == 4), torch.nan, image[:, :1])
        image[:, -1:] = torch.where((kind == 4) & (k in (3, 7)), torch.inf, image[:, -1:])
        return image

    return fn, first


def scaled(fn: Callable, z0: Tensor, scale: float) -> tuple[Callable, Tensor]:
    """Return the same problem in another unit: fn'(z) = scale fn(z / scale)."""
    return lambda z, k: scale * fn(z / scale, k), scale * z0


def scalar_tolerance(before: dict, after: dict) -> Tensor:
    """Allowed error of norms: they are sums over the state, in float32 within a chunk for all dtypes but float64."""
    compute = torch.promote_types(before["z"].dtype, torch.float32)
    return tolerance(compute, before["z"].shape[1]) * after["scalars"].abs().nan_to_num(0.0, 0.0)


def sensitivity(reference: Callable, before: dict, after: dict, perturb: Callable, tries: int = 2) -> dict:
    """Return how far what ``reference`` writes moves where ``perturb(arguments, generator)`` disturbs them."""
    names, generator = [name for name in after if name != "return"], torch.Generator().manual_seed(0)
    moved: dict = {}
    for _ in range(tries):
        arguments = dict(zip(names, copy(tuple(before[name] for name in names)), strict=True))
        perturb(arguments, generator)
        with torch.no_grad():
            reference(*arguments.values())
        for name in names:
            moved[name] = widest(moved.get(name), arguments[name], after[name])
    return moved


def widest(so_far, one, other):
    if isinstance(one, list | tuple):
        so_far = so_far or [None] * len(one)
        return [widest(*entry) for entry in zip(so_far, one, other, strict=True)]
    if not isinstance(one, Tensor):
        return 0.0
    difference = (one.double() - other.double()).abs().nan_to_num(0.0, 0.0)
    return difference if so_far is None else torch.maximum(so_far, difference)


def check_frozen(op: torch._ops.OpOverload, samples: Sequence[Sequence]) -> int:
    """Check that a step leaves the rows of samples that are done unchanged, to the last bit, on every instruction set.

    Returns how many such rows there were.
    """
    names = [argument.name for argument in op._schema.arguments]
    rows = 0
    for sample in samples:
        before = dict(zip(names, sample, strict=True))
        status = before["counters"][:, Counter.STATUS]
        stopped = (status == Status.MAX_STEPS) | (status >= Status.DIVERGED)
        if before["freeze"]:
            stopped = status != RUNNING
        rows += int(stopped.sum())
        for _, after in on_each_instruction_set(lambda sample=sample: run(op, names, sample)):
            for name, argument in before.items():
                parts = argument if isinstance(argument, list) else [argument]
                changed = after[name] if isinstance(argument, list) else [after[name]]
                for one, other in zip(parts, changed, strict=True):
                    if isinstance(one, Tensor) and name != "progress" and one.numel():
                        if name == "best":
                            one, other = one.transpose(0, 1), other.transpose(0, 1)
                        assert torch.equal(bits(one[stopped]), bits(other[stopped])), name
    return rows
