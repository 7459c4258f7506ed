"""Resources of the CUDA kernels, found without a GPU: ``python -m benchmarks.resources``.

    kernels   registers, spills, stack and shared memory of each kernel on each architecture, as nvcc reports them; from
              the machine code, how many instructions it has, how many of them load 16 bytes (loads), the most that are
              issued before a loaded register is first used (loads_under_way), and the number of loads that are used
              before another one is issued, so that nothing hides their latency (loads_alone)
    traffic   bytes of global memory that the steps of a solve move, counted by the emulator of ``tests/csrc``, next
              to what the design allows; the launches, blocks of a cluster and shared memory that they take

The kernels are compiled again with the options of the build in ``build/``, which must exist (``make``): some minutes.
The machine code is read by ``nvdisasm``, next to nvcc or on PATH.
``--archs 9.0`` names other architectures than those of a wheel; ``--only traffic`` leaves the compiler out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine_code
from benchmarks.results import row_by_row

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "cuda-resources.json"
PARTS = ("kernels", "traffic")
REGISTERS = 65536  # of a multiprocessor, on every architecture since 3.5
ALLOCATED = 8  # registers of a thread are allocated in multiples of this


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--archs", help='such as "9.0" or "8.0;9.0" (default: those of a wheel)')
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.only and arguments.out.exists() else {}
    found["command"] = "python -m benchmarks.resources"
    if arguments.only != "traffic":
        found.update(compile_all(arguments.archs))
    if arguments.only != "kernels":
        found["traffic"] = traffic_rows()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(row_by_row(found))
    show(found)
    return 0


# Registers, spills and shared memory


def compile_all(archs: str | None) -> dict[str, Any]:
    """Compile each file of kernels for each architecture.

    Raises:
        SystemExit: If there is no build to take options from, or a file does not compile.
    """
    toolkit = runpy.run_path(str(ROOT / "csrc" / "cuda_toolkit.py"))
    database = ROOT / "build" / "libraries" / "compile_commands.json"
    commands = json.loads(database.read_text()) if database.exists() else []
    commands = [entry for entry in commands if entry["file"].endswith(".cu")]
    if not commands:
        raise SystemExit("no build with CUDA kernels is in build/: run make first, where nvcc is")
    nvcc = toolkit["find_toolkit"](os.environ)
    wanted = re.split(r"[;,\s]+", archs) if archs else [arch for arch in toolkit["ARCHS"] if arch in nvcc.archs]
    disassembler = find_disassembler(nvcc.nvcc)
    jobs = [(entry, arch) for arch in wanted for entry in commands]
    at_once = int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        rows = [row for found in pool.map(lambda job: measure(job[0], job[1], disassembler), jobs) for row in found]
    order = {arch.replace(".", ""): index for index, arch in enumerate(wanted)}
    rows.sort(key=lambda row: (row["kernel"], row["dtype"], order[row["arch"].replace(".", "")]))
    return {"nvcc": nvcc.version, "kernels": rows}


def find_disassembler(nvcc: str) -> str:
    """The path of nvdisasm: next to nvcc, or on PATH.

    Raises:
        SystemExit: If it is at neither.
    """
    beside = Path(nvcc).resolve().parent / "nvdisasm"
    if found := shutil.which(str(beside)) or shutil.which("nvdisasm"):
        return found
    raise SystemExit(
        f"nvdisasm is neither next to {nvcc} nor on PATH: it is part of a CUDA toolkit, and of the Python package"
        " nvidia-cuda-nvdisasm (put its folder nvidia/cu13/bin on PATH)"
    )


def measure(entry: dict[str, str], arch: str, disassembler: str) -> list[dict[str, Any]]:
    """A row for each kernel in a file, compiled as in the build but only for this architecture."""
    words = [word for word in shlex.split(entry["command"]) if not word.startswith("--generate-code")]
    number = arch.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        words[words.index("-o") + 1] = cubin
        words[words.index("-c")] = "-cubin"
        words += [f"--generate-code=arch=compute_{number},code=[sm_{number}]", "--resource-usage"]
        rows = parse(run(words, entry["directory"]))
        if not rows:  # a binding, whose kernels are compiled apart
            return []
        functions = machine_code.parse(run([disassembler, "-c", cubin], folder))
    return [{**row, **of_code(function)} for row, function in pair(rows, functions)]


def run(words: Sequence[str], folder: str) -> str:
    """The output of a command.

    Raises:
        SystemExit: If it fails.
    """
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def pair(
    rows: list[dict[str, Any]], functions: list[machine_code.Function]
) -> list[tuple[dict[str, Any], machine_code.Function]]:
    """Each row with its kernel's machine code."""
    by_name = {readable(function.name): function for function in functions}
    return [(row, by_name[row["kernel"], row["dtype"]]) for row in rows]


def of_code(function: machine_code.Function) -> dict[str, int]:
    """The columns that come from a kernel's machine code."""
    found = machine_code.loads_under_way(function)
    return {
        "instructions": len(function.code),
        "loads": len(found),
        "loads_under_way": max(found, default=0),
        "loads_alone": found.count(1),
    }


def parse(text: str) -> list[dict[str, Any]]:
    """A row for each kernel in the output of nvcc --resource-usage.

    Raises:
        ValueError: If the numbers of a kernel are not found.
    """
    rows = []
    for block in text.split("Compiling entry function ")[1:]:
        name, arch = re.findall(r"'(\w+)'", block)[:2]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        if not frame or not used:
            raise ValueError(f"no numbers for {name} in: {block}")
        static = re.search(r"(\d+) bytes smem", block)
        kernel, dtype = readable(name)
        registers = int(used[1])
        rows.append(
            {
                "kernel": kernel,
                "dtype": dtype,
                "arch": re.sub(r"sm_(\d+)(\d)", r"\1.\2", arch),
                "registers": registers,
                "spill_stores": int(frame[2]),
                "spill_loads": int(frame[3]),
                "stack": int(frame[1]),
                "static_shared": int(static[1]) if static else 0,
                "warps_by_registers": REGISTERS // (-(-registers // ALLOCATED) * ALLOCATED * 32),
            }
        )
    return rows


DTYPES = {"d": "float64", "f": "float32", "NS_7Float16E": "float16", "NS_8BFloat16E": "bfloat16"}
TYPE = "|".join(DTYPES)


def readable(name: str) -> tuple[str, str]:
    """("anderson_step: reduce", "float32") from a mangled name of a kernel.

    Raises:
        ValueError: If it is another name.
    """
    if match := re.match(rf"_ZN5pydeq\d+step_([a-z]+)_kernelINS_\d+([A-Z][a-z]+)StepI({TYPE})E", name):
        return f"{match[2].lower()}_step: {match[1]}", DTYPES[match[3]]
    if match := re.match(rf"_ZN5pydeq\d+([a-z_]+)_kernelI({TYPE})E", name):
        return match[1], DTYPES[match[2]]
    raise ValueError(f"not a kernel of pydeq: {name}")


# Bytes


def traffic_rows() -> list[dict[str, Any]]:
    """Means over the steps of a solve, in vectors of D entries per sample."""
    for folder in ("csrc", "ops"):
        sys.path.insert(0, str(ROOT / "tests" / folder))
    import traffic  # pyright: ignore[reportMissingImports]

    rows = []
    for name, method in traffic.METHODS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for path, limits in traffic.PATHS.items():
                for kind in traffic.MAPS:
                    steps = traffic.count(name, dtype, path, kind)
                    allowed = sum(sum(method.design(step.step)) for step in steps) / len(steps)
                    reads, writes = (sum(getattr(s, what) for s in steps) / len(steps) for what in ("reads", "writes"))
                    rows.append(
                        {
                            "op": name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "D": traffic.STATES[path],
                            "path": path,
                            "residual": kind,
                            "reads": round(reads, 3),
                            "writes": round(writes, 3),
                            "design": round(allowed, 3),
                            "ratio": round((reads + writes) / allowed, 3),
                            "launches": max(step.result.launches for step in steps),
                            "cluster": max(step.result.cluster for step in steps),
                            "dynamic_shared": max(step.result.shared_bytes for step in steps),
                            "shared_available": limits.shared_bytes,
                        }
                    )
    return rows


def show(found: dict[str, Any]) -> None:
    for part in PARTS:
        rows = found.get(part, [])
        if not rows:
            continue
        columns = list(rows[0])
        table = [columns, *([str(row[column]) for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        print(f"\n{part}")
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
