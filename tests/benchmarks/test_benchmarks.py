"""The benchmark harness itself: it counts calls, stops nobody early, reads memory, and says what it could not do."""

import json
import math
import sys

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark suite's own requirements are not installed")

from benchmarks import __main__ as command
from benchmarks import peers
from benchmarks.allocations import peak_bytes
from benchmarks.environment import facts
from benchmarks.peers.base import METHODS, LayerSettings, Method
from benchmarks.peers.pydeq import PEER
from benchmarks.problems.convolution import ConvCell
from benchmarks.problems.dense import DenseCell
from benchmarks.problems.maps import elementwise, symmetric_linear, tanh_map
from benchmarks.problems.trained import trained
from benchmarks.problems.transformer import TransformerCell
from benchmarks.profiles import PROFILES
from benchmarks.progress import SILENT
from benchmarks.results import Results, Target, number, row_by_row
from benchmarks.suites import SUITES, adjoints, jacobian, training
from benchmarks.suites.base import Context
from benchmarks.timing import Counted, Recorded, Timed, WatchedCell, alternate, ratios, spread
from pydeq.solvers.buffers import Scratch

PEERS, _ = peers.load()


@pytest.fixture(params=list(PEERS))
def peer(request):
    return PEERS[request.param]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.solver)
@pytest.mark.parametrize("calls", [3, 12, 31])
def test_run_makes_exactly_the_calls_asked_for(peer, method, calls):
    problem = elementwise(4, 64)
    fn = Recorded(problem.fn)
    peer.run(fn, problem.z0, method, calls)
    assert len(fn.residuals) == calls
    # An overhead is not measured on a solve that is over.
    assert min(residual.min() for residual in fn.residuals) > 1e-6


def test_pydeq_freezes_no_sample_in_a_run():
    problem = elementwise(4, 64)
    for method in METHODS:
        assert (PEERS["pydeq"].run(problem.fn, problem.z0, method, 31).sample_nfe == 31).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.solver)
@pytest.mark.parametrize("cap", [1, 2, 3, 7])
def test_solve_never_makes_more_calls_than_its_cap(peer, method, cap):
    problem = tanh_map(16, 0.9, seed=0, batch=3)
    fn = Counted(problem.fn)
    outcome = peer.solve(fn, problem.z0, method, 1e-12, cap)
    assert fn.calls <= cap
    assert not outcome.converged


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.solver)
def test_solve_reaches_the_tolerance_that_it_reports(peer, method):
    problem = tanh_map(16, 0.5, seed=0, batch=3)
    outcome = peer.solve(problem.fn, problem.z0, method, 1e-4, 100)
    assert outcome.converged
    assert outcome.residual.shape == (3,)
    assert outcome.residual.max() <= 1e-4
    torch.testing.assert_close(problem.fn(outcome.value), outcome.value, rtol=0, atol=1e-3)


def test_maps_have_the_spectral_radius_they_name():
    problem = tanh_map(32, 0.8, seed=1)
    zero = torch.zeros(1, 32)
    pre = torch.func.jacrev(lambda z: torch.atanh(problem.fn(z.expand(32, -1))[0].double()))(zero)
    radius = torch.linalg.eigvals(pre[:, 0]).abs().max().item()
    assert radius == pytest.approx(0.8, rel=1e-3)
    assert problem.facts["spectral_norm"] > 0.8
    problem = symmetric_linear(0, dim=20)
    linear = torch.func.jacrev(lambda z: problem.fn(z.expand(32, -1))[0])(torch.zeros(1, 20))[:, 0]
    assert torch.linalg.matrix_norm(linear, 2).item() == pytest.approx(0.95, rel=1e-4)


def test_alternate_flips_the_order_and_drops_the_warmup():
    order = []
    sides = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    measured = alternate(sides, repeats=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert measured == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_alternate_is_content_with_three_where_they_take_long():
    measured = alternate({"a": lambda: 1.0}, repeats=100, seconds=0.0)
    assert measured == {"a": [1.0, 1.0, 1.0]}


def test_spread_and_ratios():
    assert spread([3.0, 1.0, 2.0]).median == 2.0
    assert spread([5.0]).samples == 1
    ratio = ratios([2.0, 8.0, 6.0], [1.0, 2.0, 3.0])
    assert ratio.median == 3.0
    assert ratio.low <= ratio.median <= ratio.high


def test_timed_counts_and_sums():
    fn = Timed(torch.sin)
    fn(torch.zeros(3))
    fn(torch.zeros(3))
    assert fn.calls == 2
    assert fn.seconds > 0


def test_peak_bytes_sees_what_is_held_at_once():
    size = 1 << 20

    def two_of_three():
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(size, dtype=torch.uint8)
        del first
        return second, torch.empty(size, dtype=torch.uint8)

    assert peak_bytes(two_of_three, PEER.forget) == 2 * size


def test_peak_bytes_counts_what_is_kept_for_the_next_solve():
    size = 1 << 20

    def take_and_keep():
        scratch = Scratch(torch.zeros(1, dtype=torch.uint8))
        scratch.empty(size)
        scratch.release()

    assert peak_bytes(take_and_keep, PEER.forget) >= size


def test_targets_tell_met_from_missed_from_unmeasured():
    assert Target("a", "", ">=", 2.0, 2.0, "x").met is True
    assert Target("a", "", "<=", 2.0, 2.1, "x").met is False
    assert Target("a", "", "<=", 2.0, math.inf, "x").met is False
    assert Target("a", "", ">=", 2.0, None, "x").met is None


def test_results_are_plain_json_with_unique_names(tmp_path):
    results = Results(facts(PROFILES["smoke"], {"pydeq": "0"}))
    results.figure("a", math.inf, "ms")
    with pytest.raises(ValueError, match="name must be new, got 'a' a second time"):
        results.figure("a", 1.0, "ms")
    results.save(tmp_path / "summary.json")
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["figures"][0]["value"] is None
    assert {"date", "commit", "cpu", "threads", "versions", "device", "profile", "kernels"} <= set(content)
    assert {"python", "torch", "pydeq"} <= set(content["versions"])


def test_published_json_has_a_row_on_each_line():
    content = {"command": "python", "empty": [], "figures": [{"a": 1}, {"a": 2.5}]}
    text = row_by_row(content)
    assert json.loads(text) == content
    assert '\n  {"a": 1},\n  {"a": 2.5}\n' in text


def test_numbers_are_short():
    shown = [number(value) for value in (1234.5, 0.01234, 1.5e-6, 12.0, 0.0, None, math.inf)]
    assert shown == ["1234", "0.0123", "1.50e-06", "12", "0", "-", "inf"]


def test_a_missing_peer_is_left_out_with_a_notice(monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.peers.torchdeq", raising=False)
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    found, notices = peers.load()
    assert list(found) == ["pydeq"]
    assert len(notices) == 1
    assert "torchdeq is left out" in notices[0]


@pytest.fixture
def context():
    results = Results(facts(PROFILES["smoke"], dict.fromkeys(PEERS, "0")))
    return Context(PROFILES["smoke"], PEERS, results, SILENT, (1,))


def test_watched_cells_count_evaluations_and_products():
    torch.manual_seed(0)
    watched = WatchedCell(DenseCell(4))
    x = torch.randn(2, 4)
    with torch.no_grad():
        watched(x, x)
    z = x.clone().requires_grad_()
    y = watched(watched(z, x), x)
    assert (watched.calls, watched.products) == (3, 0)
    for _ in range(2):
        torch.autograd.grad(y.sum(), z, retain_graph=True)
    assert watched.products == 4
    torch.autograd.grad(y.sum(), watched.cell.linear.weight)
    assert watched.products == 5  # the inner evaluation's z needs none
    torch.autograd.grad(watched(z, x).sum(), z)
    assert watched.products == 6


@pytest.mark.parametrize("cell", ["conv", "transformer", "dense"])
def test_libraries_agree_on_a_training_step(cell):
    torch.manual_seed(0)
    cell, x = {
        "conv": lambda: (ConvCell(8), torch.randn(2, 8, 4, 4)),
        "transformer": lambda: (TransformerCell(16, 2, 32), torch.randn(2, 5, 48)),
        "dense": lambda: (DenseCell(12), torch.randn(3, 12)),
    }[cell]()
    z0 = torch.zeros(*x.shape[:-1], 16) if isinstance(cell, TransformerCell) else torch.zeros_like(x)
    settings = LayerSettings(Method("anderson", 6), rtol=1e-5, max_calls=60, adjoint_rtol=1e-5, adjoint_max_calls=60)
    weights = torch.randn_like(z0)
    gradients, penalties = [], []
    for peer in PEERS.values():
        z, penalty = peer.layer(cell, settings).solve_penalized(z0, x)
        gradients.append(torch.autograd.grad((z * weights).sum(), list(cell.parameters()), retain_graph=True))
        penalties.append(penalty)
        torch.autograd.grad(penalty, list(cell.parameters()), allow_unused=True)
    for ours, theirs in zip(gradients[0], gradients[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)
    # Other probes, but one quantity: a mean over every entry.
    assert 0.3 < penalties[0] / penalties[-1] < 3.0


def test_transformer_cells_look_back_only():
    torch.manual_seed(0)
    cell = TransformerCell(8, 2, 16)
    z, x = torch.randn(1, 6, 8), torch.randn(1, 6, 24)
    J = torch.autograd.functional.jacobian(lambda x: cell(z, x)[0, :, 0], x)[:, 0].abs().sum(-1)
    assert (J.triu(1) == 0).all()
    assert (J.tril()[3] > 0)[:4].all()


def test_dense_cells_have_the_radius_and_rank_asked_for():
    torch.manual_seed(0)
    weight = DenseCell(32, radius=0.7, rank=3).linear.weight.detach()
    assert torch.linalg.eigvals(weight).abs().max().item() == pytest.approx(0.7, rel=1e-4)
    assert torch.linalg.matrix_rank(weight).item() == 3


def test_training_reports_what_it_counts(context, monkeypatch):
    case = training.Case("tiny", "tiny", lambda: (DenseCell(8), torch.zeros(2, 8), torch.randn(2, 8)), 3.0)
    monkeypatch.setattr(training, "CASES", (case,))
    training.run(context)
    value = context.results.value
    for kind in training.KINDS:
        for name in PEERS:
            assert value(f"training.tiny.{kind}.{name}.step") > 0
            assert 3 <= value(f"training.tiny.{kind}.{name}.evaluations") <= 33
            assert 2 <= value(f"training.tiny.{kind}.{name}.products") <= 33
            assert value(f"training.tiny.{kind}.{name}.memory") > 0
    evaluations = [value(f"training.tiny.{kind}.pydeq.evaluations") for kind in training.KINDS]
    assert evaluations[0] == evaluations[1]  # the penalty takes none of its own
    assert {target.name for target in context.results.targets} == {
        "training.tiny",
        "training.never_slower",
        "training.penalty_price",
    }


def test_estimates_come_closer_with_more_products(context, monkeypatch):
    monkeypatch.setattr(training, "CASES", training.CASES[-1:])

    def cells(_):
        torch.manual_seed(0)
        z = torch.randn(4, 32)
        yield "tiny", "tiny", DenseCell(32, rank=5), z, z

    monkeypatch.setattr(jacobian, "_cells", cells)
    jacobian.run(context)
    for estimate in jacobian.ESTIMATES:
        errors = [context.results.value(f"jacobian.error.tiny.{estimate.key}.probes{k}") for k in jacobian.PRODUCTS]
        assert errors[0] > 2 * errors[-1]
        if estimate.options.get("method") == "hutch++":
            assert errors[-1] < 1e-5  # ten directions hold all of rank 5
    assert context.results.value("jacobian.dense.probes8.torchdeq") or "torchdeq" not in PEERS


def test_adjoints_compare_with_the_exact_gradient(context, monkeypatch):
    torch.manual_seed(0)
    cell, x, target = DenseCell(24, radius=0.8), torch.randn(4, 24), torch.randn(4, 24)
    case = adjoints.Case("tiny", "tiny", cell, x, lambda z: (z - target.to(z)).square().mean())
    # Against the formula: u = (I - J^T)^-1 v at the fixed point, in float64.
    W = cell.linear.weight.detach().double().requires_grad_()
    z = torch.zeros(4, 24, dtype=torch.float64)
    for _ in range(400):
        z = torch.tanh(z @ W.detach().T + x)
    slope = 1 - z.square()
    v = 2 * (z - target) / z.numel()
    J = slope[:, :, None] * W.detach()
    u = torch.linalg.solve(torch.eye(24, dtype=torch.float64) - J.mT, v[:, :, None])[:, :, 0]
    expected = (u * slope).T @ z
    torch.testing.assert_close(adjoints._reference(case), expected.flatten(), rtol=1e-6, atol=1e-9)

    monkeypatch.setattr(adjoints, "_cases", lambda _: iter([case]))
    adjoints.run(context)
    value = context.results.value
    assert value("adjoints.tiny.implicit_gmres_1e-6.error") < 1e-2
    assert value("adjoints.tiny.jacobian_free.error") > 0.1
    assert value("adjoints.tiny.phantom_3.products") == 2
    assert value("adjoints.tiny.rtol1e-06.gmres.converged") == 1.0
    assert value("adjoints.tiny.rtol1e-06.gmres.products") <= 27  # 24 unknowns, the first and the last


@pytest.mark.filterwarnings("ignore:the forward solve of a pydeq.DEQ")
def test_trained_cells_classify():
    found = trained(1, penalized=False)
    with torch.no_grad():
        solve = PEERS["pydeq"].layer(found.cell, training.SETTINGS).solve
        logits, _, _ = found.model(found.images, lambda z0, x: solve(z0, x))
    assert (logits.argmax(1) == found.labels).float().mean() > 0.3
    assert trained(1, penalized=False) is found


def test_unknown_suite_names_the_choices(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["--only", "speed"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "got 'speed'" in message
    assert all(name in message for name in SUITES)


def test_unwritable_out_is_said_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        command.main(["--out", str(tmp_path / "file" / "out")])
    assert exit_.value.code == 2
    assert "argument --out: cannot write to" in capsys.readouterr().err


def test_one_suite_from_the_command_line_to_the_page(tmp_path, capsys):
    assert command.main(["--profile", "smoke", "--only", "memory", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "summary.json").read_text())
    assert "memory.anderson.memory6.pydeq" in {figure["name"] for figure in content["figures"]}
    page = (tmp_path / "report.html").read_text()
    assert '<h2 id="targets">Targets</h2>' in page
    assert "http" not in page.replace("http-equiv", "")
    assert "Peak memory" in capsys.readouterr().out


def test_full_broyden_memory_is_enough_for_every_step():
    fn = Counted(elementwise(2, 16).fn)
    solution = PEERS["pydeq"].run(fn, torch.zeros(2, 16), Method("broyden"), 20)
    assert fn.calls == solution.nfe == 20
