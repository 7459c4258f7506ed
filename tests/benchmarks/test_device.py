"""benchmarks/device without a GPU: whatever happens to a case, the other cases' rows are there.

That the cases themselves run is tested with the script that calls them, in test_gpu_check.py.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device import clock, summary
from benchmarks.device.parent import FAILED, OUT_OF_TIME, Parent

ROOT = Path(__file__).parent.parent.parent

# A worker with the cases that its first argument names; each fares as its name says.
WORKER = """
import argparse, os, signal, sys, time
from benchmarks.device.worker import Case, work

broken = False

def run(name):
    global broken
    if name == "absent":
        raise ImportError("no jax")
    yield {"figure": 1.5}
    if name == "wrong":
        raise ValueError("no figure\\nand more of it")
    if name == "broken":
        broken = True
        raise RuntimeError("CUDA error: misaligned address")
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "exit":
        os._exit(3)
    if name == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    yield {"figure": 2.5}

parser = argparse.ArgumentParser()
parser.add_argument("names")
parser.add_argument("--skip")
parser.add_argument("--pipe", type=int)
arguments = parser.parse_args()
names = arguments.names.split(",")
if names[0] == "absent at all":
    sys.exit(5)
cases = [Case(name, lambda name=name: run(name), 1.0 if name == "hang" else 60.0) for name in names]
sys.exit(work(cases, arguments.skip.split(","), arguments.pipe, lambda: broken))
"""
BOTH = [{"figure": 1.5}, {"figure": 2.5}]
ENDS = {
    "wrong": {"failed": "ValueError: no figure"},
    "broken": {"failed": "RuntimeError: CUDA error: misaligned address"},
    "crash": {"failed": "the process was ended by SIGSEGV"},
    "exit": {"failed": "exit status 3"},
    "hang": {"failed": "it took more than 1 s"},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs cases by their names, and returns the exit status and the rows that were written."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*names: str, seconds: float = 100.0) -> tuple[int, list[dict]]:
        shown: list[dict] = []
        path = tmp_path / "stage.jsonl"
        status = Parent([sys.executable, "-c", WORKER, ",".join(names)], path, seconds, shown.append).run()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows == shown
        assert [row["at"] for row in rows] == sorted(row.pop("at") for row in shown)
        return status, shown

    return run


def of(case: str, *rows: dict) -> list[dict]:
    return [{"case": case, **row} for row in rows]


def test_all_cases_run_in_one_process(run):
    assert run("one", "two") == (0, of("one", *BOTH) + of("two", *BOTH))


@pytest.mark.parametrize("name", list(ENDS))
def test_a_case_that_fails_loses_nothing(run, name):
    status, rows = run("one", name, "two")
    assert status == FAILED
    assert rows == of("one", *BOTH) + of(name, BOTH[0], ENDS[name]) + of("two", *BOTH)


def test_a_case_whose_package_is_absent_has_not_failed(run):
    assert run("absent", "one") == (0, of("absent", {"not run": "no jax"}) + of("one", *BOTH))


def test_failures_one_after_another(run):
    _, rows = run("crash", "exit", "broken", "one")
    ends = [row for row in rows if "failed" in row]
    assert ends == [{"case": name, **ENDS[name]} for name in ("crash", "exit", "broken")]
    assert rows[-2:] == of("one", *BOTH)


def test_a_worker_that_never_begins_is_not_started_again(run):
    assert run("absent at all") == (FAILED, [{"failed": "a worker began no case: exit status 5"}])


def test_cases_that_no_time_is_left_for_are_named(run):
    status, rows = run("one", seconds=0.0)
    assert (status, rows) == (OUT_OF_TIME, [{"not run": "no time was left", "cases": []}])


def test_a_stage_that_is_stopped_says_so(tmp_path):
    path = tmp_path / "stage.jsonl"
    code = (
        "import sys; from pathlib import Path; from benchmarks.device.parent import Parent;"
        "sys.exit(Parent(sys.argv[2:], Path(sys.argv[1]), 100.0, print).run())"
    )
    worker = [sys.executable, "-c", WORKER.replace("1.0 if", "60.0 if"), "one,hang,two"]
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(path), *worker], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60.0
    while not (path.exists() and '"hang"' in path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30.0) == OUT_OF_TIME
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["not run"] == "the stage was stopped by SIGTERM"
    assert last["cases"] == ["hang", "two"]


def test_a_row_is_one_line_for_a_reader():
    row = {"case": "host", "at": 1.5, "solver": "picard", "us": 12.34567}
    assert summary.line(row) == "  host: solver picard, us 12.35"


def test_a_summary_shows_what_failed_and_lines_cut_off(tmp_path, capsys):
    (tmp_path / "first.jsonl").write_text('{"case": "one", "figure": 1.5}\n{"case": "two", "failed": "why"}\n{"case": ')
    assert summary.show(tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["first: 3 rows", "  two: failed why", '  -: failed not a row: {"case": ']


def test_counts_the_kernels_by_their_names():
    text = (ROOT / "csrc" / "cuda" / "step.cuh").read_text()
    names = re.findall(r"^(step_\w+_kernel)\(", text, flags=re.MULTILINE)
    assert len(names) == 3
    assert all(map(clock.STEP_KERNEL.search, names))
