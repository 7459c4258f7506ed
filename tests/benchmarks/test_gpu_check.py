"""benchmarks/gpu_check.sh with stand-ins for a GPU's tools: what one stage does, the others' results survive."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STAGES = ("machine", "build", "tests", "memcheck", "racecheck", "synccheck", "benchmarks")

# Says what it is asked to do, and does as the environment says: FAIL or HANG names what fails or hangs.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *setup.py*) what=build ;;
  *benchmarks.device*) what=benchmarks ;;
  *"-m sanitize"*) what=sanitizers ;;
  *"-m pytest"*) what=tests ;;
  *) what=other ;;
esac
echo "stand-in for: $*"
[ "$HANG" = $what ] && exec sleep 60
[ "$FAIL" = $what ] && exit 3
[ $what = benchmarks ] && echo '{}' > "$OUT/device.json"
exit 0
"""
# As the real one, refuses options that it does not know, and, unless told otherwise, what uses no CUDA.
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
TOOLS = {
    "python": PYTHON,
    "nvidia-smi": "#!/usr/bin/env bash\necho 'a GPU that is not there'\n",
    "nvcc": "#!/usr/bin/env bash\necho 'release 13.0'\n",
    "compute-sanitizer": SANITIZER,
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


def check(tools: Path, **environment: str) -> tuple[int, dict[str, str], str]:
    """The exit status, the state of each stage, and what was printed."""
    out = tools.parent / "out"
    inherited = {**os.environ, "FAIL": "", "HANG": "", "OUT": str(out), "PYTHON": str(tools / "python")}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh")],
        env={**inherited, "PATH": f"{tools}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )
    stages = json.loads((out / "stages.json").read_text())
    log = (out / "log.txt").read_text()
    for name in stages:
        assert f"\n=== {name} (at most " in log
    # Not tests.xml, which a stand-in does not write.
    assert {path.name for path in out.iterdir()} <= {"log.txt", "stages.json", "device.json"}
    return done.returncode, {name: entry["state"] for name, entry in stages.items()}, done.stdout


def test_all_stages_pass(tools):
    status, states, printed = check(tools)
    assert status == 0
    assert states == dict.fromkeys(STAGES, "passed")
    log = (tools.parent / "out" / "log.txt").read_text()
    assert "stand-in for: -m benchmarks.device --out" in log
    for tool in ("memcheck", "racecheck", "synccheck"):  # on pydeq's kernels alone
        assert f"compute-sanitizer --tool {tool} --kernel-name kns=pydeq\n" in log
    for name in STAGES:  # the table at the end
        assert f"\n{name} " in printed


@pytest.mark.parametrize(
    ("fails", "stages"),
    [("tests", ["tests"]), ("sanitizers", ["memcheck", "racecheck", "synccheck"]), ("benchmarks", ["benchmarks"])],
)
def test_a_stage_that_fails_loses_nothing(tools, fails, stages):
    status, states, _ = check(tools, FAIL=fails)
    assert status == 1
    assert list(states) == list(STAGES)
    for name in STAGES:
        failed = {"failed (3)", "failed (99)"} if name in stages else {"passed"}
        assert states[name] in failed, name
    assert (tools.parent / "out" / "device.json").exists() == (fails != "benchmarks")


def test_a_stage_that_hangs_is_ended(tools):
    status, states, _ = check(tools, HANG="tests", LIMIT="2")
    assert status == 1
    assert states == {**dict.fromkeys(STAGES, "passed"), "tests": "out of time"}


def test_nothing_runs_on_a_build_that_failed(tools):
    status, states, _ = check(tools, FAIL="build")
    assert status == 1
    assert states == {"machine": "passed", "build": "failed (3)"}


def test_a_machine_that_forbids_sanitizers_is_said_to(tools):
    (tools / "compute-sanitizer").write_text("#!/usr/bin/env bash\necho refused\nexit 1\n")
    status, states, _ = check(tools)
    assert status == 0
    assert states == {name: "not run" if name.endswith("check") else "passed" for name in STAGES}


def test_the_stages_take_less_than_nine_minutes():
    text = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    limits = [int(word) for word in re.findall(r'stage (?:\w+|"\$tool") (\d+) ', text)]
    assert len(limits) == 5
    once, sanitizer = limits[:3] + limits[4:], limits[3]
    assert sum(once) + 3 * sanitizer < 9 * 60
