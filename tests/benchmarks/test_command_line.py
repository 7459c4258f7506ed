"""The command line of the suite: what it asks for, what a stopped run keeps, and how long it says a run takes."""

from __future__ import annotations

import io
import json
import math

import pytest

pytest.importorskip("rich", reason="the benchmark suite's own requirements are not installed")

from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import environment
from benchmarks.partial import Kept, Partial, read_shares
from benchmarks.profiles import PROFILES
from benchmarks.progress import SILENT, Board, Estimate, about
from benchmarks.results import Entry, Results
from benchmarks.suites.base import Context
from benchmarks.timing import Spread


def filled():
    results = Results({"profile": "smoke", "device": "cpu"})
    results.figure("a.b", Spread(2.0, 1.0, 3.0, 5), "ms")
    results.figure("a.c", math.inf, "1")
    results.target("a.b", "Short", "<=", 3.0, math.inf, "ms")
    results.table("a", "A table", ("x", "y"), [("1", "2")], "A note")
    results.curve("residual", "panel", "pydeq", "Anderson", (1.0, 2.0), (0.5, 0.25))
    results.entries.append(Entry("p", "family", "pydeq.anderson", "pydeq", "solved", 12.0, 3.0, 0.5, 0.4, 0.6))
    results.notices.append("something")
    results.seconds["a"] = 1.5
    return results


def test_results_come_back_from_a_file():
    results = filled()
    assert Results.from_json(json.loads(json.dumps(results.contents()))) == results
    again = Results.from_json(results.to_json())
    assert again.targets[0].measured is None  # infinity is no JSON
    assert again.tables == results.tables


def test_results_of_suites_are_added_once():
    results = filled()
    other = Results({})
    other.figure("d", 1.0, "1")
    other.seconds["d"] = 2.0
    results.add(other)
    assert results.value("d") == 1.0
    assert results.seconds == {"a": 1.5, "d": 2.0}
    with pytest.raises(ValueError, match="must be new, got 'd' a second time"):
        results.add(other)


def test_values_are_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"seconds": 0.25, "shape": (1, 2)}

    path = tmp_path / "rows.jsonl"
    assert Kept(path)("a", compute) == {"seconds": 0.25, "shape": [1, 2]}
    with path.open("a") as file:
        file.write('["b", {"sec')  # killed while it wrote
    kept = Kept(path)
    assert kept("a", compute) == {"seconds": 0.25, "shape": [1, 2]}
    assert len(calls) == 1
    assert kept("b", lambda: None) is None
    assert Kept(path)("b", compute) is None
    assert len(calls) == 1
    assert Kept()("a", lambda: 1) == 1


def test_a_run_continues_only_under_the_same_conditions(tmp_path):
    facts = {"profile": "quick", "code": "abc", "cpu": "fast", "date": "today", "load_at_start": 0.1}
    partial = Partial(tmp_path / "partial")
    with pytest.raises(ValueError, match="no unfinished run"):
        partial.start(facts, resume=True)
    partial.start(facts, resume=False)
    partial.save("a", filled())
    partial.start(facts | {"date": "tomorrow", "load_at_start": 2.0, "commit": "of documents"}, resume=True)
    assert partial.load("a") == filled()
    assert partial.load("b") is None
    for name, value in (("profile", "full"), ("code", "def"), ("cpu", "slow")):
        with pytest.raises(ValueError, match=f"{name} must be that of the unfinished run"):
            partial.start(facts | {name: value}, resume=True)
    partial.start(facts, resume=False)
    assert partial.load("a") is None


def test_code_is_told_from_documents_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    found = [environment.code()]
    for name in ("pydeq/a.py", "csrc/b/c.cu", "benchmarks/suites/d.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
        found.append(environment.code())
        path.write_text("2")
        found.append(environment.code())
    (tmp_path / "pydeq/a.py").rename(tmp_path / "pydeq/e.py")
    found.append(environment.code())
    assert len(set(found)) == len(found)
    for name in ("docs/a.md", "benchmarks/report/a.py", "benchmarks/out/a.py", "pydeq/libpydeq_cpu.so"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    assert environment.code() == found[-1]


def test_problems_of_other_runs_are_reused_only_under_the_same_conditions(tmp_path):
    facts = {"profile": "quick", "code": "abc", "versions": {"torch": "2"}, "cores": 2, "date": "today"}
    rows = [{"problem": problem, "seconds": 0.5, "contender": name} for problem in "ab" for name in ("x", "y")]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(facts | {"cores": 1, "date": "yesterday", "entries": rows[:2], "seconds": {}}))
    second.write_text(json.dumps(facts | {"entries": rows[2:], "seconds": {}}))
    partial = Partial(tmp_path / "partial")
    partial.start(facts, resume=False)
    partial.reuse(read_shares([first, second], facts))
    kept = partial.kept("contest")
    assert kept("contest.a", lambda: "measured") == rows[:2]
    assert kept("contest.b", lambda: "measured") == rows[2:]
    assert kept("contest.c", lambda: "measured") == "measured"
    for name, value in (("profile", "full"), ("code", "def"), ("versions", {"torch": "3"})):
        with pytest.raises(ValueError, match=rf"{name} must be that of .*first\.json"):
            read_shares([first], facts | {name: value})
    for text in ("{}", "[]", "{"):
        first.write_text(text)
        with pytest.raises(ValueError, match=r"first\.json is not a summary"):
            read_shares([first], facts)


def test_a_run_that_cannot_be_reused_is_named(tmp_path, capsys):
    arguments = ["--profile", "smoke", "--only", "contest", "--out", str(tmp_path)]
    assert command.main([*arguments, "--reuse", str(tmp_path / "absent.json")]) == 2
    assert "--reuse: " in (error := capsys.readouterr().err)
    assert "absent.json" in error
    with pytest.raises(SystemExit):
        command.main(["--only", "nfe", "--reuse", str(tmp_path / "absent.json")])
    assert "it is for the contest" in capsys.readouterr().err


@pytest.fixture
def suites(monkeypatch):
    """Three small suites; the second one fails in the way that the test chooses."""
    ran, failure = [], {"error": None}

    def suite(name):
        def run(context):
            ran.append(name)
            context.bar.start(1)
            context.results.figure(f"{name}.value", 1.0, "1")
            context.results.table(name, name, ("x",), [("1",)])
            context.kept("row", lambda: ran.append(f"{name} row"))
            if name == "memory" and failure["error"]:
                raise failure["error"]

        return run

    for name in list(command.SUITES):
        monkeypatch.delitem(command.SUITES, name)
    for name in ("overhead", "memory", "nfe"):
        monkeypatch.setitem(command.SUITES, name, suite(name))
    return ran, failure


def test_a_stopped_run_is_resumed(suites, tmp_path, capsys):
    ran, failure = suites
    arguments = ["--profile", "smoke", "--out", str(tmp_path)]
    failure["error"] = KeyboardInterrupt()
    assert command.main(arguments) == 130
    assert "add --resume" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()
    ran.clear()
    failure["error"] = None
    assert command.main([*arguments, "--problems", "spectra", "--resume"]) == 2
    assert "problems_asked must be that of the unfinished run, None, got ['spectra']" in capsys.readouterr().err
    assert command.main([*arguments, "--resume"]) == 0
    assert ran == ["memory", "nfe", "nfe row"]
    content = json.loads((tmp_path / "summary.json").read_text())
    assert [figure["name"] for figure in content["figures"]] == ["overhead.value", "memory.value", "nfe.value"]
    assert set(content["seconds"]) == {"overhead", "memory", "nfe"}
    assert command.main([*arguments, "--resume"]) == 2
    assert "no unfinished run" in capsys.readouterr().err


def test_a_suite_that_fails_runs_again(suites, tmp_path, capsys):
    ran, failure = suites
    arguments = ["--profile", "smoke", "--out", str(tmp_path)]
    failure["error"] = RuntimeError("out of luck")
    assert command.main(arguments) == 1
    output = capsys.readouterr()
    assert "memory failed: RuntimeError: out of luck" in output.out
    assert "Traceback" in output.err
    assert len(json.loads((tmp_path / "summary.json").read_text())["figures"]) == 3
    ran.clear()
    failure["error"] = None
    assert command.main([*arguments, "--resume"]) == 0
    assert ran == ["memory"]
    assert json.loads((tmp_path / "summary.json").read_text())["notices"] == []


def test_names_are_checked_and_passed_on(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setitem(command.SUITES, "memory", seen.append)
    options = ["--profile", "smoke", "--out", str(tmp_path), "--only", "memory"]
    assert (
        command.main([*options, "--peers", "torchdeq", "--problems", "more,burk", "--problems", "spectra.jordan"]) == 0
    )
    assert seen[0].peers_asked == ("torchdeq",)
    assert seen[0].problems_asked == ("more", "burk", "spectra.jordan")
    assert seen[0].device == "cpu"
    assert command.main([*options, "--peers", ""]) == 0
    assert list(seen[1].peers) == ["pydeq"]
    for option, got, known in (
        ("--peers", "numpyro", "torchdeq"),
        ("--only", "speed", "overhead"),
        ("--problems", "tanh", "spectra"),
    ):
        with pytest.raises(SystemExit) as exit_:
            command.main([option, got])
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert f"argument {option}" in message
        assert f"got '{got}'" in message
        assert known in message


def test_a_device_runs_only_the_suites_that_follow_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "torch finds no GPU" in capsys.readouterr().err
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda", "--only", "memory"])
    assert "only these suites run on a GPU" in capsys.readouterr().err


def test_contexts_say_what_is_asked():
    everything = Context(PROFILES["smoke"], {}, Results({}), SILENT, (1,))
    assert everything.asks_library("scipy")
    assert everything.asks_problem("family", "key")
    some = Context(
        PROFILES["smoke"], {}, Results({}), SILENT, (1,), peers_asked=("scipy",), problems_asked=("root", "dense.d8")
    )
    assert [some.asks_library(name) for name in ("pydeq", "scipy", "jaxopt")] == [True, True, False]
    cases = [("root", "x"), ("", "dense.d8.1"), ("", "dense.d1"), ("dense", "x")]
    assert [some.asks_problem(*case) for case in cases] == [True, True, False, False]


def test_the_time_left_follows_this_machine():
    estimate = Estimate(["a", "b", "c"], {"a": 10.0, "b": 20.0})
    assert estimate.left() == 45.0  # c counts as the mean
    assert estimate.left("a", 4.0) == 41.0
    assert estimate.left("a", 40.0) == 35.0
    estimate.finish("a", 20.0)  # twice as slow
    assert estimate.left() == 70.0
    unknown = Estimate(["a", "b"], {})
    assert unknown.left() is None
    unknown.finish("a", 5.0)
    assert unknown.left() == 5.0


def test_the_time_left_of_a_suite_follows_what_is_done_of_it():
    estimate = Estimate(["contest", "b"], {"contest": 100.0, "b": 20.0})
    assert estimate.left("contest", 30.0, 0.01) == 2990.0  # more problems than in the run before
    assert estimate.left("contest", 30.0, 0.6) == 40.0  # fewer
    unknown = Estimate(["contest", "b"], {})
    assert unknown.left("contest", 10.0) is None
    assert unknown.left("contest", 10.0, 0.25) == 70.0  # b counts as long as this one


def test_times_are_rough():
    shown = [about(seconds) for seconds in (1, 34, 70, 400, 9000)]
    assert shown == [
        "about 10 seconds", "about 30 seconds", "about 1 minute", "about 7 minutes", "about 2.5 hours",
    ]  # fmt: skip


def test_earlier_seconds_are_those_of_the_profile(tmp_path):
    for name, content in (
        ("out", {"profile": "full", "seconds": {"a": 1.0, "b": 2.0}}),
        ("published", {"profile": "quick", "seconds": {"b": 3.0, "c": 4.0}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "broken").write_text("{")
    paths = [tmp_path / name for name in ("out", "missing", "broken", "published")]
    assert command.seconds_before(paths, "quick") == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert command.seconds_before(paths, "full") == {"a": 1.0, "b": 2.0, "c": 4.0}


def test_a_log_has_a_line_for_each_start_and_end():
    console = Console(file=io.StringIO(), width=100)
    with Board(console, ["a", "b"], {"a": 60.0, "b": 60.0}) as board, board.suite("a"):
        pass
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "a: running; about 2 minutes left"
    assert lines[1].startswith("a: done after 0.0 s")


def test_a_terminal_has_a_bar_for_the_whole_run():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Board(console, ["a", "b"], {"a": 60.0, "b": 60.0}) as board, board.suite("a") as bar:
        bar.start(2)
        bar.advance("halfway")
        board.refresh()
    output = console.file.getvalue()
    assert "about 2 minutes left" in output
    assert "halfway" in output
