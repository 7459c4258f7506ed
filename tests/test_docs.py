"""Every Python block of README and docs runs in a process of its own, and prints what the page says.

The output is the ``text`` block that follows directly, compared as doctest does: ``...`` matches anything.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")))
BLOCK = re.compile(
    r"^( *)```python[^\n]*\n(.*?)^ *```\n(?:(?: *\n)*^ *```text[^\n]*\n(.*?)^ *```$)?", re.DOTALL | re.MULTILINE
)
# Programs for torchrun begin like this.
TORCHRUN = "# torchrun --nproc-per-node 2 "
# Pages with code that cannot run, in ``py`` blocks, and why.
NOT_RUN = {"docs/experiments/recipes.md": "needs lightning, transformers and wandb, which the tests do not install"}


@dataclass(frozen=True)
class Block:
    """A block of Python in a page.

    Args:
        page: The page, relative to the repository.
        line: Line of the page where the block begins.
        code: The block.
        printed: What the page says that it prints; None if it says nothing.
    """

    page: str
    line: int
    code: str
    printed: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def write(self, path: Path) -> Path:
        """Write the code to a file, with the line numbers of the page."""
        path.write_text("\n" * self.line + self.code, encoding="utf-8")
        return path

    def check(self, output: str) -> None:
        """Compare the output with what the page says."""
        checker, options = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if self.printed is not None and not checker.check_output(self.printed, output, options):
            pytest.fail(f"{self}\n{checker.output_difference(doctest.Example('', self.printed), output, options)}")


def blocks_of(page: str) -> list[Block]:
    """The Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        indent = f"^{match[1]}"
        code, printed = (part and re.sub(indent, "", part, flags=re.MULTILINE) for part in match.group(2, 3))
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, code, printed))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def environment() -> dict[str, str]:
    """The environment of a block: this repository is imported from any folder, and torch has one thread."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server():
    """A process that runs blocks in forks of itself, with warnings as errors."""
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "run_blocks.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment()) as process:
        yield process
        process.kill()


def run(server: subprocess.Popen[str], path: Path, folder: Path) -> str:
    """Run a file by the server, and return what it printed."""
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([str(path), str(folder)]), file=server.stdin, flush=True)
    if (status := server.stdout.readline()) != "0\n":
        pytest.fail(f"exit status {status}{(folder / 'stderr').read_text(encoding='utf-8')}")
    return (folder / "stdout").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", [each for each in BLOCKS if not each.code.startswith(TORCHRUN)], ids=str)
def test_block(block, server, tmp_path):
    block.check(run(server, block.write(tmp_path / "block.py"), tmp_path))


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.code.startswith(TORCHRUN)], ids=str)
def test_block_for_many_processes(block, tmp_path):
    """The output in the page is that of rank 0; in docs/distributed.md all ranks print the same after their number."""
    program = block.write(tmp_path / "program.py")
    options = ("--standalone", "--nproc-per-node", "2", "--redirects", "1", "--log-dir", "logs")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(program)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = (path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("logs/**/stdout.log")))
    block.check(first)
    if block.page == "docs/distributed.md":
        assert first
        assert second.splitlines() == [re.sub("^0 ", "1 ", line) for line in first.splitlines()]


def test_the_first_command_of_readme(server, tmp_path):
    """The page says what ``python -c`` prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((code, printed),) = re.findall(r'^    python -c "(.*)" +# (.*)$', text, re.MULTILINE)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    assert run(server, tmp_path / "block.py", tmp_path) == f"{printed}\n"


def test_code_that_does_not_run_is_known():
    assert {page for page in PAGES if "```py\n" in (ROOT / page).read_text(encoding="utf-8")} == set(NOT_RUN)


def test_a_wrong_output_is_found(server, tmp_path):
    block = Block("page.md", 7, "import warnings\nprint('a', 1.25)\n", "a 1...\n")
    block.check(run(server, block.write(tmp_path / "block.py"), tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:7\nExpected:\n    b\nGot:\n    a 1.25"):
        Block("page.md", 7, block.code, "b\n").check("a 1.25\n")
    warning = Block("page.md", 7, "import warnings; warnings.warn('careful')\n", None)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)line 8, in <module>.*UserWarning: careful"):
        run(server, warning.write(tmp_path / "block.py"), tmp_path)


def test_a_source_distribution_has_what_its_tests_read():
    """The folders of MANIFEST.in hold every page that is run here."""
    kept = [line.split()[1] for line in (ROOT / "MANIFEST.in").read_text().splitlines() if line.startswith("graft ")]
    assert {Path(page).parts[0] for page in PAGES} - {"README.md"} <= set(kept)  # setuptools adds README.md
