"""Memory that steps on a GPU keep, and memory that they know to be pinned: plain host code, compiled here."""

from __future__ import annotations

import subprocess

from emulated import FOLDER, ROOT, compiler


def test_host_memory(tmp_path):
    program = tmp_path / "memory"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-pthread"]
    source = FOLDER / "host" / "memory.cpp"
    subprocess.run([*compiler(), *flags, "-I", str(ROOT / "csrc"), str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
