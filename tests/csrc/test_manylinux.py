"""What wheels for manylinux_2_28 are linked with: old versions of glibc's functions, and definitions of our own."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess

import pytest
from emulated import FOLDER, ROOT, compiler

STUBS = runpy.run_path(str(ROOT / "csrc" / "manylinux" / "stubs.py"))

# As readelf prints them.
SYMBOLS = """
  1: 0001 10 FUNC    GLOBAL DEFAULT   16 pthread_create@@GLIBC_2.34
  2: 0001 10 FUNC    GLOBAL DEFAULT   16 pthread_create@GLIBC_2.2.5
  3: 0002 10 FUNC    GLOBAL DEFAULT   16 timer_create@@GLIBC_2.34
  4: 0002 10 FUNC    GLOBAL DEFAULT   16 timer_create@GLIBC_2.2.5
  5: 0002 10 FUNC    GLOBAL DEFAULT   16 timer_create@GLIBC_2.3.3
  6: 0003 10 FUNC    GLOBAL DEFAULT   16 pthread_clockjoin_np@@GLIBC_2.34
  7: 0003 10 FUNC    GLOBAL DEFAULT   16 pthread_clockjoin_np@GLIBC_2.31
  8: 0004 10 FUNC    GLOBAL DEFAULT   16 pthread_self@@GLIBC_2.2.5
  9: 0005 10 FUNC    GLOBAL DEFAULT   16 stat@@GLIBC_2.33
 10: 0006 10 OBJECT  GLOBAL DEFAULT   16 __libc_single_threaded@@GLIBC_2.32
"""


def test_old_versions_are_the_last_ones_that_glibc_2_28_has():
    assert STUBS["old_versions"](SYMBOLS) == {"pthread_create": "GLIBC_2.2.5", "timer_create": "GLIBC_2.3.3"}


def test_a_program_is_linked_with_the_old_version_and_runs(tmp_path):
    if not shutil.which("readelf"):
        pytest.skip("readelf is not on PATH")
    source, program, folder = tmp_path / "program.cpp", tmp_path / "program", tmp_path / "stubs"
    source.write_text(
        "#include <pthread.h>\n"
        "static void* run(void* value) { return value; }\n"
        "int main() {\n"
        "  pthread_t thread;\n"
        "  void* value = nullptr;\n"
        "  pthread_create(&thread, nullptr, run, &thread);\n"
        "  pthread_join(thread, &value);\n"
        "  return value == &thread ? 0 : 1;\n"
        "}\n"
    )
    STUBS["main"](compiler()[0], folder)
    command = [*compiler(), str(source), "-Wl,--no-as-needed", str(folder / "libpthread.so.0"), "-o", str(program)]
    subprocess.run(command, check=True)
    symbols = subprocess.run(["readelf", "--dyn-syms", "--wide", program], check=True, capture_output=True, text=True)
    versions = dict(re.findall(r"UND (pthread_\w+)@(?:GLIBC_)?([\d.]+)", symbols.stdout))
    assert set(versions) == {"pthread_create", "pthread_join"}
    assert all(tuple(map(int, version.split("."))) <= (2, 28) for version in versions.values()), versions
    assert subprocess.run([program]).returncode == 0


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_pointers_to_exceptions_count(tmp_path, level):
    program = tmp_path / "exception_pointers"
    flags = ["-std=c++17", level, "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    sources = [FOLDER / "host" / "exception_pointers.cpp", ROOT / "csrc" / "manylinux" / "symbols.cpp"]
    subprocess.run([*compiler(), *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
