"""benchmarks/gpu_check.sh with stand-ins for a GPU and its tools: no stage costs another one its results."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
MEASURED = ("first", "overhead", "captured")
STAGES = ("machine", "libraries", *MEASURED, "operations", "solves", "memcheck", "racecheck", "counters")

# Says what it is asked to do, and does as the environment says: FAIL, HANG or CRASH names what fails, hangs or is ended
# by a signal. With REAL, what benchmarks/device does is done by that Python, on a CPU that passes for a GPU.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *setup.py*) what=build ;;
  *"-m benchmarks.device usable"*) what=libraries ;;
  *"-m benchmarks.device"*) what=$3 ;;
  *"-m sanitize"*) what=sanitizers ;;
  *test_ops_on_a_gpu.py) what=operations ;;
  *test_solves_on_a_gpu.py) what=solves ;;
  *) what=other ;;
esac
echo "stand-in for: $*"
[ "$HANG" = $what ] && exec sleep 60
[ "$FAIL" = $what ] && exit 3
[ "$CRASH" = $what ] && kill -SEGV $$
if [ "$REAL" ] && [ "$2" = benchmarks.device ]; then exec env PYTHONPATH="$STAND_IN:$PYTHONPATH" "$REAL" "$@"; fi
case $what in first | overhead | captured) echo '{"figure": 1.5}' > "$OUT/$what.jsonl" ;; esac
exit 0
"""
# As the real ones, they refuse options that they do not know; compute-sanitizer also, unless told otherwise, what uses
# no CUDA.
SANITIZER = """#!/usr/bin/env bash
required=yes
while [ "${1##*/}" != python ]; do
  case "$1" in
    --require-cuda-init) required=$2 ;;
    --kernel-name | --tool | --error-exitcode | --print-limit) ;;
    *) exit 255 ;;
  esac
  shift 2
done
[ "$2" = -c ] && [ $required = yes ] && exit 255
"$@"
"""
NCU = """#!/usr/bin/env bash
while [ "${1##*/}" != python ]; do
  case "$1" in
    --clock-control | --profile-from-start | --kernel-name | --section) ;;
    *) exit 255 ;;
  esac
  shift 2
done
"$@"
"""
TOOLS = {
    "python": PYTHON,
    "nvidia-smi": "#!/usr/bin/env bash\necho 'a GPU that is not there'\n",
    "nvcc": "#!/usr/bin/env bash\necho 'release 13.0'\n",
    "compute-sanitizer": SANITIZER,
    "ncu": NCU,
}

pytestmark = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="no bash or timeout")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in TOOLS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def command(tools: Path, **environment: str) -> dict:
    """Arguments of subprocess that run the script."""
    nothing = dict.fromkeys(("FAIL", "HANG", "CRASH", "REAL"), "")
    inherited = {**os.environ, **nothing, "OUT": str(tools.parent / "out"), "PYTHON": str(tools / "python")}
    inherited.pop("PYTHONPATH", None)
    path = f"{tools}:{os.environ['PATH']}"
    return {"args": ["bash", str(SCRIPT)], "env": {**inherited, "PATH": path, **environment}}


def check(tools: Path, **environment: str) -> tuple[int, dict[str, str], str]:
    """The exit status, the state of each stage, and what was printed."""
    done = subprocess.run(**command(tools, **environment), capture_output=True, text=True, timeout=300)
    out = tools.parent / "out"
    states = read_states(out)
    log = (out / "log.txt").read_text()
    for name in states:
        if states[name] != "no time left":
            assert f"\n=== {name} (at most " in log
        assert re.search(rf"^{name} +{re.escape(states[name])}", done.stdout, flags=re.MULTILINE)
    # Few files, and whole ones.
    assert {path.name for path in out.iterdir()} <= {"log.txt", "stages.json", *(f"{name}.jsonl" for name in MEASURED)}
    return done.returncode, states, done.stdout


def read_states(out: Path) -> dict[str, str]:
    return {name: entry["state"] for name, entry in json.loads((out / "stages.json").read_text()).items()}


PASSED = dict.fromkeys(STAGES, "passed")


def test_all_stages_pass(tools):
    status, states, _ = check(tools)
    assert (status, states) == (0, PASSED)
    log = (tools.parent / "out" / "log.txt").read_text()
    assert "stand-in for: -m benchmarks.device overhead --out" in log
    assert "stand-in for: -m benchmarks.device counters" in log
    for tool in ("memcheck", "racecheck"):  # on pydeq's kernels only
        assert f"compute-sanitizer --tool {tool} --kernel-name kns=pydeq\n" in log


@pytest.mark.parametrize(
    ("how", "fails", "stages"),
    [
        *(("FAIL", name, [name]) for name in (*MEASURED, "operations", "counters")),
        ("FAIL", "sanitizers", ["memcheck", "racecheck"]),
        ("CRASH", "first", ["first"]),
        ("CRASH", "sanitizers", ["memcheck", "racecheck"]),
    ],
)
def test_a_stage_that_fails_loses_nothing(tools, how, fails, stages):
    status, states, _ = check(tools, **{how: fails})
    assert status == 1
    for name in STAGES:
        assert states[name] == "passed" if name not in stages else states[name].startswith("failed ("), name
    for name in MEASURED:
        assert (tools.parent / "out" / f"{name}.jsonl").exists() == (name != fails)


@pytest.mark.parametrize("name", ["first", "solves"])
def test_a_stage_that_hangs_is_ended(tools, name):
    status, states, _ = check(tools, HANG=name, LIMIT="4")
    assert (status, states) == (1, {**PASSED, name: "out of time"})


def test_no_stage_begins_when_the_time_of_all_is_over(tools):
    status, states, _ = check(tools, HANG="first", TOTAL="6")
    assert status == 1
    assert (states["machine"], states["first"]) == ("passed", "out of time")
    assert list(states) == list(STAGES)
    assert {states[name] for name in STAGES[3:]} == {"no time left"}


def test_a_check_that_is_stopped_keeps_what_it_has(tools):
    running = subprocess.Popen(**command(tools, HANG="captured"), stdout=subprocess.PIPE, text=True)
    log = tools.parent / "out" / "log.txt"
    deadline = time.monotonic() + 60.0
    while not (log.exists() and "stand-in for: -m benchmarks.device captured" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    printed, _ = running.communicate(timeout=30.0)
    assert running.returncode == 143
    before = dict.fromkeys(STAGES[: STAGES.index("captured")], "passed")
    assert read_states(log.parent) == {**before, "captured": "stopped"}
    assert re.search("^captured +stopped", printed, flags=re.MULTILINE)
    assert (log.parent / "overhead.jsonl").exists()


def test_libraries_that_do_not_run_here_are_built(tools):
    text = PYTHON.replace("*setup.py*) what=build ;;", '*setup.py*) touch "$0.built" ;;')
    refusal = '[ $what = libraries ] && [ ! -f "$0.built" ] && exit 1\n'
    (tools / "python").write_text(text.replace('[ "$HANG"', refusal + '[ "$HANG"'))
    status, states, _ = check(tools)
    assert status == 0
    assert states == {**PASSED, "libraries": "failed (1)", "build": "passed"}
    assert list(states)[:4] == ["machine", "libraries", "build", "first"]


def test_libraries_that_are_slow_to_load_are_not_built_again(tools):
    _, states, _ = check(tools, HANG="libraries", LIMIT="4")
    assert states == {**PASSED, "libraries": "out of time"}


def test_nothing_is_built_or_run_where_torch_sees_no_gpu(tools):
    assert check(tools, FAIL="other")[:2] == (1, {"machine": "failed (3)"})


def test_nothing_runs_on_a_build_that_failed(tools):
    status, states, _ = check(tools, FAIL="libraries")
    assert status == 1
    assert states == {"machine": "passed", "libraries": "failed (3)", "build": "failed (3)"}


def test_a_machine_that_forbids_tools_is_said_to(tools):
    (tools / "compute-sanitizer").write_text("#!/usr/bin/env bash\necho refused\nexit 1\n")
    (tools / "ncu").write_text("#!/usr/bin/env bash\necho '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
    status, states, _ = check(tools)
    assert status == 0
    assert states == {**PASSED, **dict.fromkeys(("memcheck", "racecheck", "counters"), "not run")}


def test_the_stages_take_at_most_seven_minutes():
    text = SCRIPT.read_text()
    limits = dict(re.findall(r"stage (\w+) (\d+) ", text))
    assert limits.pop("build") == "200"
    assert set(limits) == set(STAGES)
    assert "total=${TOTAL:-420}" in text
    assert sum(int(limits[name]) for name in STAGES[2:]) <= 420 - 25  # what the first two take of theirs


def test_prepares_what_is_carried(tools):
    carry = tools.parent / "carry"
    (tools / "python").write_text(
        '#!/usr/bin/env bash\n[ "$2" = pip ] && echo "of ${@: -1}" > "$CARRY/peer.whl"\nexit 0\n'
    )
    arguments = command(tools, CARRY=str(carry))
    done = subprocess.run([*arguments["args"], "--prepare"], env=arguments["env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (carry / "peer.whl").read_text().startswith("of torchdeq==")
    size = (carry / "peer.whl").stat().st_size
    assert re.search(rf"^ +{size}  {carry}/peer.whl$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^ +\d+  with the checkout, \d+ MiB of at most 64$", done.stdout, flags=re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("carry: ")


def test_refuses_to_carry_libraries_without_cuda_kernels(tools):
    (tools / "python").write_text("#!/usr/bin/env bash\n[[ $2 != *cuda_built* ]]\n")
    arguments = command(tools, CARRY=str(tools.parent / "carry"))
    done = subprocess.run([*arguments["args"], "--prepare"], env=arguments["env"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "the build has no CUDA kernels: put nvcc on PATH, or name it by CUDACXX\n"
    assert "carry: " not in done.stdout


def test_refuses_what_it_does_not_know(tools):
    arguments = command(tools)
    done = subprocess.run([*arguments["args"], "--build"], env=arguments["env"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu_check.sh takes no argument, or --prepare, got --build" in done.stderr


def rows_of(out: Path, stage: str) -> dict[str, list[dict]]:
    """The rows of a stage by their cases."""
    found: dict[str, list[dict]] = {}
    for line in (out / f"{stage}.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row.pop("case"), []).append(row)
    return found


@pytest.mark.kernels
def test_measures_on_a_stand_in_through_a_crash_a_fault_and_a_hang(tools):
    """Every case of benchmarks/device, but for three that end badly, each in another way."""
    real = {"REAL": sys.executable, "STAND_IN": str(Path(__file__).parent / "stand_in"), "STAND_IN_TINY": "1"}
    bad = {"STAND_IN_CRASH": "anderson cluster", "STAND_IN_FAULT": "training", "STAND_IN_HANG": "broyden dense"}
    status, states, printed = check(tools, LIMIT="150", TOTAL="1000", **real, **bad)
    assert status == 1
    assert states == {**PASSED, **dict.fromkeys(MEASURED, "failed (1)")}
    ends = {"first": "the process was ended by SIGABRT", "overhead": "RuntimeError: CUDA error: misaligned address"}
    ends["captured"] = "it took more than 2 s"
    rows = {stage: rows_of(tools.parent / "out", stage) for stage in MEASURED}
    for stage, case in zip(MEASURED, bad.values(), strict=True):
        assert [row for row in rows[stage][case] if "figure" in row]
        assert rows[stage][case][-1]["failed"] == ends[stage]
        failed = [name for name, found in rows[stage].items() if any("failed" in row for row in found)]
        assert failed == [case]
        assert next(iter(rows[stage])) == "environment"
        assert printed.count(f"  {case}: failed {ends[stage]}") == 2  # when it happened, and at the end
    first, overhead, captured = rows.values()
    assert list(first).index("gmres split") < list(first).index("report") < list(first).index("step anderson")
    assert first["picard block"][0]["error after 5 steps"] == 0.0  # the stand-in is the CPU
    assert {"launch us", "graph node us"} <= set(first["launch"][0])
    assert {row.get("solver") for row in first["host"]} == {None, "picard", "anderson", "broyden"}
    peers = first["environment"][0]["peers"]
    for name in ("overhead anderson", "solve broyden", "mdeq_tiny", "transformer"):
        for row in overhead[name]:
            assert {f"{peer} {'us' if name.startswith('overhead') else 'ms'}" for peer in peers} <= set(row)
    assert captured["anderson elementwise"][0]["replayed ms"] > 0.0
