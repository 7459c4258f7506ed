"""Write libraries to link with in place of glibc's own, for a binary that also runs with glibc 2.28.

glibc 2.34 made libpthread, libdl and librt part of libc, and gave their functions a new version. A binary linked there
refuses to run with an older glibc, although the new glibc has the old versions, too. CUDA's static runtime uses about
fifty of these functions. The stubs have the old names of the libraries and the old versions of the functions. They are
linked before libc, and nothing in them ever runs.

    python stubs.py COMPILER FOLDER
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

MERGED = "GLIBC_2.34"
OLDEST = (2, 28)
# Where a function was before, by the beginning of its name.
LIBRARIES = {
    "libpthread.so.0": ("pthread_", "sem_"),
    "libdl.so.2": ("dl",),
    "librt.so.1": ("aio_", "lio_", "mq_", "shm_", "timer_"),
}


def old_versions(symbols: str) -> dict[str, str]:
    """Return the last old version of each function that got a new one when the libraries were merged.

    Args:
        symbols: What readelf prints of libc's dynamic symbols. ``name@@version`` is what is linked by default.
    """
    moved = set(re.findall(rf"\bFUNC\b.* (\w+)@@{re.escape(MERGED)}\b", symbols))
    found: dict[str, tuple[int, ...]] = {}
    for name, version in re.findall(r"\bFUNC\b.* (\w+)@GLIBC_([\d.]+)", symbols):
        number = tuple(map(int, version.split(".")))
        if name in moved and number[:2] <= OLDEST:
            found[name] = max(number, found.get(name, ()))
    return {name: "GLIBC_" + ".".join(map(str, number)) for name, number in found.items()}


def write_stub(compiler: str, path: Path, versions: dict[str, str]) -> None:
    """Compile a shared library with these functions, by name and version."""
    nodes = defaultdict(list)
    for name, version in sorted(versions.items()):
        nodes[version].append(name)
    script, source = path.with_suffix(".map"), path.with_suffix(".c")
    script.write_text("".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in nodes.items()))
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(versions)))
    flags = ["-x", "c", "-w", "-fno-builtin", "-fPIC", "-shared", "-nostdlib"]
    link = [f"-Wl,-soname,{path.name}", f"-Wl,--version-script={script}", "-o", str(path)]
    subprocess.run([compiler, *flags, str(source), *link], check=True)


def main(compiler: str, folder: Path) -> None:
    libc = subprocess.run([compiler, "-print-file-name=libc.so.6"], check=True, capture_output=True, text=True).stdout
    command = ["readelf", "--dyn-syms", "--wide", libc.strip()]
    versions = old_versions(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    folder.mkdir(parents=True, exist_ok=True)
    for library, beginnings in LIBRARIES.items():
        write_stub(compiler, folder / library, {n: v for n, v in versions.items() if n.startswith(beginnings)})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
