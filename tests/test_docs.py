"""The Python blocks of README and docs run as they are, one after the other, and give what the text says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
MANY_PROCESSES = "docs/distributed.md"

# What must hold at the end, by document.
CHECKS = {
    "README.md": """
assert solution.converged.all() and loss.grad_fn is not None, solution
assert torch.allclose(z_out[-1], torch.tanh(0.5 * z_out[-1] + x), atol=2e-3)
assert torch.allclose(out["result"], torch.tanh(0.5 * out["result"] + 1), atol=2e-3)
""",
    "docs/moving.md": """
assert torch.allclose(z_out[-1], f(z_out[-1]), atol=2e-3)
assert torch.allclose(out["result"], 0.5 * torch.tanh(out["result"]) + 1, atol=2e-3)
assert torchdeq.solver.get_solver("pydeq_anderson")
""",
}


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run(folder, *arguments, **environment):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if blocks(name) and name != MANY_PROCESSES])
def test_blocks(name, tmp_path):
    (tmp_path / "blocks.py").write_text("\n".join([*blocks(name), CHECKS.get(name, "")]), encoding="utf-8")
    run(tmp_path, "-W", "error", "blocks.py")


@pytest.mark.parametrize(("number", "lines"), [(0, 10), (1, 1)])
def test_blocks_for_many_processes(number, lines, tmp_path):
    """Programs for torchrun, whose ranks print the same."""
    assert len(blocks(MANY_PROCESSES)) == 2
    (tmp_path / "program.py").write_text(blocks(MANY_PROCESSES)[number], encoding="utf-8")
    options = ("--standalone", "--nproc-per-node", "2", "--redirects", "1", "--log-dir", "logs")
    run(tmp_path, "-m", "torch.distributed.run", *options, "program.py")
    logs = sorted(tmp_path.glob("logs/**/stdout.log"))
    first, second = ([line.split(" ", 1) for line in log.read_text().splitlines()] for log in logs)
    assert len(first) == lines
    assert second == [["1", line] for _, line in first]


def test_a_source_distribution_has_what_its_tests_read():
    """The folders of MANIFEST.in hold every document that is run here."""
    kept = [line.split()[1] for line in (ROOT / "MANIFEST.in").read_text().splitlines() if line.startswith("graft ")]
    assert {Path(name).parts[0] for name in DOCUMENTS} - {"README.md"} <= set(kept)  # setuptools adds README.md
