import gc
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import pydeq
from pydeq.adjoints import convergence_warning as module
from pydeq.adjoints.convergence_warning import warn_if_unconverged


def slow(adjoint):
    """A layer whose backward is as slow as its forward: J = 0.99 I."""
    return pydeq.DEQ(
        lambda z, x: 0.99 * z.roll(1, 1) + x, solver=pydeq.Broyden(), adjoint=adjoint, rtol=1e-6, max_steps=300
    )


def backward(deq, scale=1.0):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z, solution = deq(torch.zeros_like(x), x, return_solution=True)
    (scale * z * torch.linspace(-1, 1, 40)).sum().backward()
    return solution, x.grad


def test_a_backward_solve_that_does_not_converge_warns_once_for_its_settings():
    deq = slow(pydeq.Implicit(max_steps=3, rtol=1.1e-6))
    with pytest.warns(pydeq.ConvergenceWarning, match=r"Implicit\(.*max_steps=3.*raise the adjoint's max_steps"):
        solution, _ = backward(deq)
    assert (solution.backward.status == pydeq.Status.MAX_STEPS).all()
    backward(deq)  # again: warnings are errors
    with pytest.warns(pydeq.ConvergenceWarning, match="max_steps=4"):
        backward(slow(pydeq.Implicit(max_steps=4, rtol=1.1e-6)))


def test_a_converged_backward_says_nothing():
    solution, _ = backward(slow(pydeq.Implicit(solver=pydeq.Broyden(), max_steps=200)))
    assert solution.backward.converged.all()


def test_an_overflow_is_not_warned_about():
    solution, gradient = backward(slow(pydeq.Implicit(solver=pydeq.Broyden(), max_steps=201)), scale=torch.inf)
    assert (solution.backward.status == pydeq.Status.NONFINITE).all()
    assert gradient.isnan().any()


def test_under_transforms_too():
    deq = slow(pydeq.Implicit(max_steps=3, rtol=1.2e-6))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))

    def loss(x):
        return (deq(torch.zeros_like(x), x) * torch.linspace(-1, 1, 40)).sum()

    with pytest.warns(pydeq.ConvergenceWarning):
        torch.func.grad(loss)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.grad(loss)(x)


def test_a_look_at_what_a_device_found_asks_cuda_nothing(monkeypatch):
    """Asking an event whether it is done ends the capture of a graph, in whichever thread it is."""

    def refuse(*args, **kwargs):
        raise AssertionError("CUDA was asked")

    for name in ("Event", "current_stream", "synchronize", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(module, "_warned", set())
    flag = torch.full((), module._UNWRITTEN, dtype=torch.int8)
    monkeypatch.setattr(module, "_pending", [(("these settings", "cos"), flag)])
    solution = pydeq.fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3))
    warn_if_unconverged("others", torch.cos, solution)
    assert len(module._pending) == 1  # the device has not written it yet
    flag.fill_(1)  # as the device does, some time later
    with pytest.warns(pydeq.ConvergenceWarning, match=r"DEQ\(cos, adjoint=these settings\)"):
        warn_if_unconverged("others", torch.cos, solution)
    assert not module._pending
    module._pending.append((("these settings", "cos"), torch.zeros((), dtype=torch.int8)))
    warn_if_unconverged("others", torch.cos, solution)
    assert not module._pending


def test_nothing_is_launched_while_a_graph_is_captured(monkeypatch):
    """A captured backward looks neither at its own solve nor at the ones before."""
    monkeypatch.setattr(module, "capturing", lambda device: True)
    monkeypatch.setattr(module, "_warned", set())
    solution = pydeq.fixed_point(lambda z: 2.0 * z + 1.0, torch.zeros(2, 3), solver=pydeq.Picard(), max_steps=3)
    assert not solution.converged.any()
    warn_if_unconverged("captured", torch.cos, solution)  # a warning is an error here


def unfinished(**options):
    return pydeq.DEQ(lambda z, x: 0.9 * z.roll(1, 1) + x, **{"max_steps": 3} | options)


def call(deq, **options):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return deq(torch.zeros_like(x), x, **options)


FORWARD = r"forward solve of a pydeq.DEQ\(<lambda>, .*\) left samples unconverged: pydeq.diagnose.*once for each layer"


def test_a_forward_solve_that_does_not_converge_warns_once_for_each_layer():
    deq = unfinished()
    with pytest.warns(pydeq.ConvergenceWarning, match=FORWARD):
        call(deq)
    call(deq)  # again: warnings are errors
    with pytest.warns(pydeq.ConvergenceWarning, match=FORWARD), torch.no_grad():
        call(unfinished().eval(), return_solution=True)


def test_a_cap_on_purpose_is_not_warned_about():
    call(unfinished(), max_steps=3)
    call(unfinished(eval_max_steps=2).eval())
    call(unfinished(rtol=0.0))
    call(unfinished(adjoint=pydeq.Unrolled()))
    call(unfinished(max_steps=200))  # converges
    with pytest.warns(pydeq.ConvergenceWarning, match=FORWARD):
        call(unfinished(eval_max_steps=2))  # in training mode


def test_a_layer_that_is_warned_about_is_not_kept():
    deq = unfinished()
    with pytest.warns(pydeq.ConvergenceWarning, match=FORWARD):
        call(deq)
    gone = weakref.ref(deq)
    del deq
    gc.collect()
    assert gone() is None
    with pytest.warns(pydeq.ConvergenceWarning, match=FORWARD):
        call(unfinished())  # maybe at the same address


class Named(torch.nn.Module):
    def forward(self, z, x):
        return 0.95 * z.roll(1, 1) + x


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.deq = pydeq.DEQ(Named(), **options)

    def forward(self, x):
        return self.deq(torch.zeros_like(x), x)


def test_a_warning_names_the_layer_and_the_line_of_the_user():
    x = torch.arange(8.0).repeat(2, 1).requires_grad_()
    with pytest.warns(
        pydeq.ConvergenceWarning, match=r"of a pydeq.DEQ\(Named, solver=Picard\(.*\), max_steps=4\) left"
    ) as forward:
        Model(solver=pydeq.Picard(), max_steps=4)(x)
    line = Model.forward.__code__.co_firstlineno + 1
    assert [(w.filename, w.lineno) for w in forward] == [(__file__, line)]
    adjoint = pydeq.Implicit(max_steps=2, rtol=1.3e-6)
    z = Model(solver=pydeq.Broyden(), max_steps=100, adjoint=adjoint)(x)
    with pytest.warns(
        pydeq.ConvergenceWarning, match=r"backward solve of a pydeq.DEQ\(Named, adjoint=Implicit\("
    ) as backward:
        (z * x.detach()).sum().backward()
    assert [w.filename for w in backward] == [__file__]
    assert Path(__file__).read_text().splitlines()[backward[0].lineno - 1].endswith("(z * x.detach()).sum().backward()")
    deq = pydeq.DEQ(lambda z, x: 0.95 * z.roll(1, 1) + x, solver=pydeq.Broyden(), max_steps=100, adjoint=adjoint)
    loss = (deq(torch.zeros_like(x), x) * x.detach()).sum()
    with pytest.warns(pydeq.ConvergenceWarning, match=r"DEQ\(<lambda>, "):  # the same adjoint, another cell
        loss.backward()
