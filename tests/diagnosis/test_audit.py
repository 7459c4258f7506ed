"""Every fault that an audit looks for is seeded once, and pydeq's own solvers have none, on any cell."""

import pytest
import torch
from cells import CELLS

import pydeq
from pydeq.diagnosis import Audit

BATCH, SIZE = 4, 24


def problem(rho=0.9, dtype=torch.float64, scale=1.0):
    """A map tanh(W z + x) with parameters that require grad, and where to start.

    A roll and elementwise operations, so that a sample's image has the same bits in any batch.
    """
    generator = torch.Generator().manual_seed(0)
    a = (rho * (0.5 + 0.5 * torch.rand(SIZE, generator=generator, dtype=torch.float64))).to(dtype).requires_grad_()
    x = torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def fn(z):
        return scale * torch.tanh(a * (z / scale).roll(1, 1) + x)

    return fn, torch.zeros(BATCH, SIZE, dtype=dtype)


def plain(fn, z0, steps=60):
    z = z0
    for _ in range(steps):
        z = fn(z)
    return z


def measured(fn, z):
    """Absolute and relative residuals of each sample."""
    image = fn(z)
    absolute = (image - z).norm(dim=1)
    return absolute, absolute / image.norm(dim=1)


def anderson(fn, z0, memory=5, steps=25, misplaced=False, shared=False):
    """Anderson's method in a few lines; ``misplaced`` puts images one slot away from their residuals, and ``shared``
    takes one mixture for the whole batch."""
    zs, gs, z = [], [], z0
    for k in range(steps):
        image = fn(z)
        slot = k % memory
        gs[slot : slot + 1] = [image - z]
        if misplaced and k >= memory:
            slot = (k + 1) % memory
        zs[slot : slot + 1] = [image]
        G = torch.stack(gs, dim=1)
        G = G.flatten(2) if not shared else G.transpose(0, 1).flatten(1)[None]
        gram = G @ G.transpose(1, 2)
        ridge = 1e-8 * gram.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype)
        weights = torch.linalg.solve(gram + ridge[:, None, None] * eye, torch.ones_like(gram[:, :, :1]))[:, :, 0]
        weights = weights / weights.sum(1, keepdim=True)
        z = (weights[:, :, None] * torch.stack(zs, dim=1)).sum(1)
    return z


def only(found: Audit, *words):
    """The audit found one fault, and its sentence has these words."""
    assert len(found.faults) == 1, found
    assert all(word in found.faults[0] for word in words), found
    return found


def rightly(fn, z0):
    """A solver without a fault: unrolled iteration, with its residual and its count."""
    z = plain(fn, z0)
    return z, measured(fn, z)[1], 61


def test_a_solver_without_a_fault():
    fn, z0 = problem()
    found = pydeq.audit(rightly, fn, z0)
    assert not found.faults, found
    assert found.evaluations == 61
    torch.testing.assert_close(found.residual, measured(fn, plain(fn, z0))[1].detach())
    torch.testing.assert_close(found.claimed, found.residual)
    assert found.gradient_error < 0.01


def test_a_misplaced_history():
    fn, z0 = problem(0.97)
    assert not pydeq.audit(anderson, fn, z0).faults
    found = only(pydeq.audit(lambda f, z: anderson(f, z, misplaced=True).detach(), fn, z0), "plain iteration reaches")
    worst = (found.residual / found.plain_residual).argmax()
    assert found.residual[worst] > 0.1
    assert found.residual[worst] > 3 * found.plain_residual[worst]


def damped(fn, z0, damping, steps, rtol=0.0):
    """Damped iteration, which ends for a sample that has met a relative tolerance."""
    z, running = z0, torch.ones(len(z0), 1, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(steps):
            image = fn(z)
            running = running & ((image - z).norm(dim=1) > rtol * image.norm(dim=1))[:, None]
            if not running.any():
                break
            z = torch.where(running, z + damping * (image - z), z)
    return z


def test_a_method_that_is_far_worse_than_plain_iteration():
    fn, z0 = problem()
    found = only(pydeq.audit(lambda f, z: damped(f, z, 0.1, 60), fn, z0), "60 evaluations", "does not stop there")
    residual = measured(fn, damped(fn, z0, 0.1, 60))[1].detach()
    best = torch.stack([measured(fn, plain(fn, z0, k))[1] for k in range(60)]).amin(0).detach()
    assert residual.max() < 0.1
    assert (residual / best).max() > 100
    torch.testing.assert_close(found.residual, residual)
    torch.testing.assert_close(found.plain_residual, best)
    # One that has a tolerance, and has not met it, and one that has met it.
    only(pydeq.audit(lambda f, z: damped(f, z, 0.1, 60, 1e-4), fn, z0), "60 evaluations", "does not stop there")
    found = pydeq.audit(lambda f, z: damped(f, z, 0.1, 200, 1e-2), fn, z0)
    assert not found.faults, found
    assert (found.residual / found.plain_residual).max() > 100


def test_a_sample_at_its_tolerance_is_not_blamed_for_a_slow_one():
    fn, z0 = problem()

    def mixed(z):  # the first sample contracts slowly, the others fast
        return torch.cat([0.99 * z[:1].roll(1, 1) + 1, fn(z)[1:]])

    found = pydeq.audit(lambda f, z: damped(f, z, 0.5, 60, 1e-3), mixed, z0)
    assert (found.residual / found.plain_residual)[1:].max() > 100
    assert found.residual[0] > 1e-3
    assert not found.faults, found


def test_a_careful_claim_is_not_taken_for_another_residual():
    """In float32, an absolute residual of the whole batch differs from a claim of 1e-6 by less than rounding."""
    fn, z0 = problem(dtype=torch.float32)
    for steps in range(20, 50, 4):
        found = pydeq.audit(lambda f, z, k=steps: (plain(f, z, k).detach(), 1e-6), fn, z0)
        assert not any("of the whole batch" in fault or "not the relative one" in fault for fault in found.faults), (
            found
        )
        if float(found.residual.max()) < 1e-6:
            assert not found.faults, found


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_an_absolute_residual_where_a_relative_one_was_said(scale):
    fn, z0 = problem(scale=scale)

    def solve(fn, z0):
        z = plain(fn, z0, 8)
        return z.detach(), measured(fn, z)[0]

    only(pydeq.audit(solve, fn, z0), "is the absolute one", "not the relative one")
    assert not pydeq.audit(solve, fn, z0, claims="absolute").faults


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_relative_residual_where_an_absolute_one_was_said(scale):
    fn, z0 = problem(scale=scale)

    def solve(fn, z0):
        z = plain(fn, z0, 8)
        return z.detach(), measured(fn, z)[1].max()

    only(pydeq.audit(solve, fn, z0, claims="absolute"), "is the relative one", "not the absolute one")
    assert not pydeq.audit(solve, fn, z0).faults


def test_a_residual_of_the_whole_batch():
    fn, z0 = problem()

    def hard(z):  # the last sample is small, and slow
        return torch.cat([0.3 * fn(z)[:-1], 0.99 * z[-1:].roll(1, 1) + 1e-3])

    def solve(fn, z0):
        z = plain(fn, z0, 8)
        image = fn(z)
        return z.detach(), (image - z).norm() / image.norm()

    only(pydeq.audit(solve, hard, z0), "relative one of the whole batch", f"sample {BATCH - 1}")


def test_a_residual_that_is_too_small():
    fn, z0 = problem()
    only(pydeq.audit(lambda f, z: (plain(f, z, 4).detach(), 1e-6), fn, z0), "the claim is 1e-06")
    found = pydeq.audit(lambda f, z: (plain(f, z), 1.0), fn, z0)
    assert not found.faults
    assert "the result is better than the claimed residual says" in found.notes
    only(pydeq.audit(lambda f, z: (plain(f, z), torch.zeros(7)), fn, z0), "got the shape (7,)")
    only(pydeq.audit(lambda f, z: (plain(f, z), "small"), fn, z0), "got str")


def test_a_claim_below_rounding_is_of_no_kind():
    fn, z0 = problem(dtype=torch.float16)

    def solve(fn, z0):  # the first sample is nearly exact, the others are not
        with torch.no_grad():
            z = plain(fn, z0)
            z[1:] += 0.1
        return z, 1e-6

    only(pydeq.audit(solve, fn, z0), "where the result is evaluated, but the claim is 1e-06")


def test_a_wrong_count():
    fn, z0 = problem()
    only(
        pydeq.audit(lambda f, z: (*rightly(f, z)[:2], 60), fn, z0),
        "says 60 evaluations, but called fn 61 times",
    )


@pytest.mark.parametrize("count", [torch.tensor([60, 60]), "sixty"])
def test_a_count_that_is_no_number(count):
    fn, z0 = problem()
    found = pydeq.audit(lambda fn, z0: (*rightly(fn, z0)[:2], count), fn, z0)
    only(found, "the claimed number of evaluations must be a number", type(count).__name__)


@pytest.mark.parametrize("solver", [pydeq.TrustRegion(), pydeq.NewtonKrylov()], ids=str)
def test_calls_with_gradients_are_counted(solver):
    fn, z0 = problem()
    found = pydeq.audit(lambda fn, z0: pydeq.fixed_point(fn, z0, solver=solver), fn, z0)
    assert not found.faults, found
    # Under "auto", a call shows that fn has no graph.
    detached = lambda z: fn(z.detach())  # noqa: E731
    found = pydeq.audit(lambda fn, z0: pydeq.fixed_point(fn, z0, solver=solver), detached, z0)
    assert not [fault for fault in found.faults if "called fn" in fault], found


@pytest.mark.parametrize(
    "solver",
    [
        pydeq.NewtonKrylov(mode="difference"),
        pydeq.TrustRegion(mode="difference"),
        pydeq.TrustRegion(mode="difference", vectorize=True),
    ],
    ids=str,
)
def test_products_by_differences_are_calls(solver):
    fn, z0 = problem()
    found = pydeq.audit(lambda fn, z0: pydeq.fixed_point(fn, z0, solver=solver), fn, z0)
    assert not found.faults, found
    solution = pydeq.fixed_point(fn, z0, solver=solver)
    assert solution.products > 0
    assert found.evaluations == solution.nfe + solution.products


def test_a_solver_that_maps_over_samples():
    fn, z0 = problem()

    def solve(fn, z0):
        image, count = z0, 0
        while count < 200:
            z, image, count = image, torch.vmap(lambda one: fn(one[None])[0])(image), count + 1
            residual = (image - z).norm(dim=1) / image.norm(dim=1)
            if bool((residual <= 1e-3).all()):
                break
        return z, residual.detach(), count

    found = pydeq.audit(solve, fn, z0)
    assert not [fault for fault in found.faults if "called fn" in fault], found
    assert found.evaluations == solve(fn, z0)[2]


def test_a_factor_on_complex_gradients():
    weight = (0.3 * torch.randn(6, 6, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))).mul_(1j)
    weight.requires_grad_()

    def twice(fn, z0):
        z = pydeq.DEQ(fn, rtol=1e-9, adjoint=pydeq.Implicit(rtol=1e-9))(z0)
        return z.detach() + 2.0 * (z - z.detach())

    found = pydeq.audit(twice, lambda z: torch.tanh(0.5 * z @ weight + 0.3), torch.zeros(3, 6, dtype=torch.complex128))
    only(found, "1 of 1 gradients are wrong", "it is 2 times the exact one")


def test_results_that_vary_with_the_batch():
    fn, z0 = problem()
    only(pydeq.audit(lambda f, z: anderson(f, z, shared=True), fn, z0), "results vary with the batch")

    def until_the_worst_is_done(fn, z0):
        z = z0
        while measured(fn, z)[1].max() > 1e-6:
            z = fn(z)
        return z.detach()

    only(pydeq.audit(until_the_worst_is_done, fn, z0), "results vary with the batch")


def test_a_sample_that_raises_if_another_one_changes():
    fn, z0 = problem()

    def solve(fn, z0):
        if z0.any():
            raise ArithmeticError("singular")
        return plain(fn, z0)

    only(pydeq.audit(solve, fn, z0), "raises if sample 0 starts somewhere else", "singular")


def test_fn_couples_samples():
    fn, z0 = problem()
    found = pydeq.audit(rightly, lambda z: fn(z) + 0.05 * z.mean(0), z0)
    assert not found.faults, found
    assert any("depends on other samples" in note for note in found.notes)
    assert found.gradient_error < 0.01  # of the whole batch as one system


def phantom(fn, z0, steps=1):
    with torch.no_grad():
        z = plain(fn, z0)
    return plain(fn, z, steps)


@pytest.mark.parametrize(
    ("steps", "kind"),
    [(1, "the gradient of one evaluation"), (3, "the gradient of 3 evaluations"), (5, "the gradient of 5 evaluations")],
)
def test_truncated_gradients(steps, kind):
    fn, z0 = problem()
    found = only(pydeq.audit(lambda f, z: phantom(f, z, steps), fn, z0), "2 of 2 gradients are wrong", kind)
    assert (found.gradient_error > 0.05) == (steps < 5)


def test_gradients_that_miss_a_tensor_or_have_a_factor():
    fn, z0 = problem()
    a = torch.full((SIZE,), 0.4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(BATCH, SIZE, dtype=torch.float64)

    def captures(z, a=a):
        return torch.tanh(a * z.roll(1, 1) + x)

    def without_a(f, z):
        with torch.no_grad():
            z = plain(f, z)
        extra = torch.zeros((), dtype=z.dtype, requires_grad=True)
        return z + extra

    only(pydeq.audit(without_a, captures, z0), "a tensor (24,) gets no gradient")

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            return g / 2

    only(pydeq.audit(lambda f, z: Halved.apply(plain(f, z)), fn, z0), "0.5 times the exact one")


def test_backward_raises():
    fn, z0 = problem()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("no gradient today")

    only(pydeq.audit(lambda f, z: Broken.apply(plain(f, z)), fn, z0), "backward raises", "no gradient today")


def test_a_result_without_a_graph_is_a_note():
    fn, z0 = problem()
    found = pydeq.audit(pydeq.fixed_point, fn, z0)
    assert not found.faults
    assert any("has no graph" in note for note in found.notes)


def test_a_start_that_is_modified():
    fn, z0 = problem()

    def solve(fn, z0):
        z = plain(fn, z0)
        z0.copy_(z.detach())
        return z

    only(pydeq.audit(solve, fn, z0), "modified z0")
    assert not z0.any()  # put back


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: z[:, :3], "shape of z0, (4, 24), got (4, 3)"),
        (lambda z: z.float(), "dtype of z0, torch.float64, got torch.float32"),
        (lambda z: z.masked_fill(torch.arange(BATCH)[:, None] == 2, torch.nan), "1 of 4 samples"),
        (lambda z: [z], "like z0, got list"),
        (lambda z: z.tolist(), "like z0, got list"),
        (lambda z: None, "like z0, got NoneType"),
    ],
)
def test_a_result_of_the_wrong_kind(spoil, message):
    fn, z0 = problem()
    only(pydeq.audit(lambda f, z: spoiled(f, z, spoil), fn, z0), message)


def test_a_dict_of_states():
    fn, z0 = problem()

    def two(z):
        return {"a": fn(z["b"]), "b": 0.5 * z["a"]}

    def solve(fn, z):
        for _ in range(80):
            z = fn(z)
        return z

    start = {"a": z0, "b": z0}
    found = pydeq.audit(solve, two, start)
    assert not found.faults, found
    assert found.gradient_error < 0.01
    only(pydeq.audit(lambda f, z: {"a": z0}, two, start), "the result must be the keys of z0")
    only(pydeq.audit(lambda f, z: (solve(f, z), 1e-9, 81), two, start), "says 81 evaluations")


def spoiled(fn, z0, spoil):
    result = spoil(plain(fn, z0))
    return (result, 1.0) if isinstance(result, list) else result


def test_random_numbers_are_a_note():
    fn, z0 = problem()
    found = pydeq.audit(rightly, lambda z: torch.nn.functional.dropout(fn(z), 0.2), z0)
    assert any("returns different values for the same z" in note for note in found.notes)


def test_arguments():
    fn, z0 = problem()
    with pytest.raises(TypeError, match="solve must be callable"):
        pydeq.audit(3, fn, z0)
    with pytest.raises(TypeError, match="fn must be callable"):
        pydeq.audit(rightly, 3, z0)
    with pytest.raises(ValueError, match="claims must be"):
        pydeq.audit(rightly, fn, z0, claims="both")
    with pytest.raises(TypeError, match="got tuple of 4"):
        pydeq.audit(lambda f, z: (z, z, z, z), fn, z0)
    with pytest.raises(ArithmeticError):
        pydeq.audit(lambda f, z: 1 / 0, fn, z0)


def test_it_prints():
    fn, z0 = problem()
    text = repr(pydeq.audit(lambda f, z: (plain(f, z, 4).detach(), 1e-6), fn, z0))
    assert text.startswith("Audit(1 fault, 4 evaluations, relative residual ")
    assert "\n  fault: the relative residual of sample " in text
    assert "\n  note: the result has no graph" in text


SOLVERS = [pydeq.Picard(), pydeq.Picard(damping=0.5), pydeq.Anderson(), pydeq.Broyden(), pydeq.GMRES()]


@pytest.mark.filterwarnings("ignore:the samples of a batch depend on each other")
@pytest.mark.parametrize("case", CELLS, ids=str)
def test_no_false_alarm_on_our_solvers(case):
    cell, z0, context = case.build()

    def fn(z):
        y = cell(z, *context)
        return y[0] if case.has_aux else y

    for solver in SOLVERS:
        found = pydeq.audit(lambda f, z, s=solver: pydeq.fixed_point(f, z, solver=s), fn, z0)
        assert not found.faults, (solver, found)
    context[-1].requires_grad_()
    for solver in (pydeq.Anderson(), pydeq.Broyden()):
        found = pydeq.audit(lambda f, z, s=solver: pydeq.DEQ(f, solver=s, max_steps=100)(z), fn, z0)
        assert not found.faults, (solver, found)
        assert found.gradient_error < 0.05, found


@pytest.mark.parametrize("case", [case for case in CELLS if case.state == "tensor" and not case.has_aux][::5], ids=str)
def test_no_false_alarm_on_modules_in_float32(case):
    cell, z0, context = case.build(torch.float32)
    bound = Bound(cell, context)
    found = pydeq.audit(lambda f, z: pydeq.DEQ(f)(z), bound, z0)
    assert not found.faults, found
    if isinstance(cell, torch.nn.Module):
        assert found.gradient_errors.keys() <= {name for name, _ in bound.named_parameters()}
        assert found.gradient_error < 0.05, found


class Bound(torch.nn.Module):
    """A cell with its context."""

    def __init__(self, cell, context):
        super().__init__()
        self.cell, self.context = cell, context

    def forward(self, z):
        return self.cell(z, *self.context)
