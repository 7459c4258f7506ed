"""Kernel timings: single steps, compared with the bandwidth of a copy.

``benchmarks/test_kernels.py`` is run by pytest-benchmark in a process of its own, and its JSON is folded into the
summary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.profiles import BEYOND_CACHE
from benchmarks.results import number, times
from benchmarks.suites.base import Context

_FILE = Path(__file__).parent.parent / "test_kernels.py"
SHARE = 0.7


def run(context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.json"
        timed = _run_pytest(context, output)
    copies = {
        _where(info): info["bytes"] / median for info, median in timed if info["operation"] == "copy"
    }  # bytes per second
    rows, shares = [], []
    times_of = {(info["operation"], info["implementation"], _where(info)): median for info, median in timed}
    timed.sort(key=lambda entry: _order(entry[0]))
    for info, median in timed:
        operation, implementation, where = info["operation"], info["implementation"], _where(info)
        name = f"kernels.{operation}.{where}.{implementation}"
        bandwidth = info["bytes"] / median
        share = bandwidth / copies[where]
        context.results.figure(f"{name}.time", median * 1e3, "ms")
        context.results.figure(f"{name}.bandwidth", bandwidth * 1e-9, "GB/s")
        faster = None
        if operation != "copy":
            context.results.figure(f"{name}.copy_share", share, "1")
            reference = times_of.get((operation, "reference", where))
            faster = reference / median if reference and implementation == "kernel" else None
            if implementation == "kernel" and (info["batch"], info["dim"]) == BEYOND_CACHE:
                shares.append((operation, info["threads"], share))
        rows.append(
            (
                operation,
                implementation,
                f"({info['batch']}, {info['dim']})",
                str(info["threads"]),
                number(median * 1e3),
                f"{info['reads']} + {info['writes']}",
                number(info["bytes"] * 1e-6),
                number(bandwidth * 1e-9),
                "" if operation == "copy" else number(share),
                times(faster) if faster else "",
            )
        )
    context.results.table(
        "kernels",
        "A single step, float32",
        (
            "operation", "implementation", "(B, D)", "threads", "ms", "vectors read + written", "MB", "GB/s",
            "share of copy", "below reference",
        ),
        rows,
        "Medians by pytest-benchmark. Anderson has memory 6 and a full history, Broyden has stored 15 steps, and every"
        " residual is the smallest so far. Bytes are those of the vectors in the table. Anderson and Broyden read most"
        " of them twice. The second read comes from the cache if it is large enough, so a share can exceed 1."
        " The copy moves as many bytes as Anderson's step.",
    )  # fmt: skip
    for operation in ("picard_step", "anderson_step", "broyden_step"):
        for count in context.threads:
            found = [share for name, at, share in shares if name == operation and at == count]
            context.results.target(
                f"kernels.{operation}.copy_share.t{count}",
                f"{operation}, {count} thread{'s' if count > 1 else ''}: share of a copy's bandwidth"
                f" at the largest shape, {BEYOND_CACHE}",
                ">=",
                SHARE,
                found[0] if found else None,
                "1",
            )


def _order(info: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key: copies first, then by operation, kernels before references, small to large."""
    size = info["batch"] * info["dim"]
    return info["operation"] != "copy", info["operation"], info["implementation"], size, info["threads"]


def _where(info: dict[str, Any]) -> str:
    return f"{info['batch']}x{info['dim']}.t{info['threads']}"


def _run_pytest(context: Context, output: Path) -> list[tuple[dict[str, Any], float]]:
    """The notes of each benchmark, and its median in seconds."""
    command = [
        sys.executable, "-m", "pytest", str(_FILE), "-v", "--color=no", "-p", "no:cacheprovider",
        "--benchmark-enable", "--benchmark-columns=median", f"--benchmark-json={output}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=_FILE.parent.parent,
        env={**os.environ, "PYDEQ_BENCH_PROFILE": context.profile.name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("collected "):
            context.bar.start(int(line.split()[1]))
        elif "::" in line:
            context.bar.advance(line.split("::", 1)[1].split(" ", 1)[0].strip())
    if process.wait() != 0:
        raise RuntimeError(f"the kernel timings failed:\n{''.join(lines[-60:])}")
    content = json.loads(output.read_text())
    return [(entry["extra_info"], entry["stats"]["median"]) for entry in content["benchmarks"]]
