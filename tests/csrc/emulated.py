"""Device code on the CPU: builds the emulator with its kernels, and runs cases in it.

A case is one call of an operation. Its tensors are written to a file, the emulator runs the kernels of csrc/cuda/*.cuh
on copies of them, each in memory of its own, and what they left is read back.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pydeq.ops.constants import CudaPath

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
CONSTANTS = ROOT / "pydeq" / "ops" / "constants.py"
SOURCES = (FOLDER / "emulator" / "emulator.cpp", *sorted(FOLDER.glob("*.cpp")))

DTYPE_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # as in shared/dispatch.h

COMMON_FLAGS = "-std=c++17 -Og -g1 -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra -Werror -DPYDEQ_EMULATOR"
SANITIZER_FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread -DPYDEQ_EMULATOR_TSAN",
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
}


@dataclass(frozen=True)
class Limits:
    """As ``StepLimits`` of csrc/cuda/step_shape.h."""

    shared_bytes: int = 96 << 10
    max_blocks: int = (1 << 31) - 1
    block_state: int = 8192
    cluster_blocks: int = 1
    tile_threads: int = 32
    multiprocessors: int = 0
    path: int = CudaPath.AUTO


@dataclass(frozen=True)
class Case:
    """One run of ``name``; ``arguments`` are tensors, numbers and lists of tensors by name."""

    name: str
    arguments: Mapping[str, Any]
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    offset: int = 0  # bytes that every buffer of a state's entries is away from an aligned address


@dataclass(frozen=True)
class Result:
    arguments: dict[str, Any]
    loaded: int
    stored: int
    launches: int
    shared_bytes: int
    cluster: int


class EmulatorError(Exception):
    """The emulator or a sanitizer ended the process; the message is theirs."""


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(command[0]):
        pytest.skip(f"no C++ compiler: {command[0]}")
    return command


@functools.cache
def build(sanitizer: str) -> Path:
    """The executable with every kernel, under ``sanitizer``; compiled anew where a source has changed."""
    command = compiler()
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *FOLDER.glob("**/*.h")]
    flags = shlex.split(COMMON_FLAGS)
    digest = hashlib.sha256(" ".join([*command, COMMON_FLAGS, SANITIZER_FLAGS[sanitizer]]).encode())
    for path in sorted([*headers, *SOURCES, CONSTANTS]):
        digest.update(path.read_bytes())
    target = ROOT / "build" / "emulator" / f"{sanitizer}-{digest.hexdigest()[:16]}"
    if (target / "run_cases").exists():
        return target / "run_cases"
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    generate = [str(ROOT / "csrc" / "generate_constants.py"), str(CONSTANTS)]
    subprocess.run([sys.executable, *generate, str(work / "pydeq_constants.h")], check=True)
    include = ["-I", str(ROOT / "csrc"), "-I", str(FOLDER), "-I", str(work)]

    def compile_one(source: Path) -> Path:
        extra = shlex.split(SANITIZER_FLAGS[sanitizer])
        if sanitizer == "thread" and source.stem == "emulator":
            extra.remove("-fsanitize=thread")  # it tells the sanitizer what happens
        output = work / f"{source.stem}.o"
        run_quietly([*command, *flags, *extra, *include, "-c", str(source), "-o", str(output)])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES, key=lambda path: path.stat().st_size, reverse=True)))
    run_quietly([*command, *shlex.split(SANITIZER_FLAGS[sanitizer]), *map(str, objects), "-o", str(work / "run_cases")])
    try:
        work.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return target / "run_cases"


def run_quietly(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def emulate(cases: Sequence[Case], sanitizer: str = "address") -> list[Result]:
    """Run the cases, one after the other, in one process.

    Raises:
        EmulatorError: If a kernel breaks a rule of SIMT, or a sanitizer objects.
    """
    command = [str(build(sanitizer))]
    if sanitizer == "thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # it needs its addresses free
    return run_program(command, cases)


def run_program(command: Sequence[str], cases: Sequence[Case]) -> list[Result]:
    """Run a program that was linked with run_cases.cpp on the cases.

    Raises:
        EmulatorError: If the program fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "cases"), Path(folder, "results")
        with source.open("wb") as file:
            for case in cases:
                write(file, case)
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("LD_PRELOAD", None)
        done = subprocess.run([*command, str(source), str(target)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise EmulatorError(f"exit status {done.returncode}\n{done.stdout}{done.stderr}")
        data = bytearray(target.read_bytes())
    position, results = 0, []
    for case in cases:
        arguments: dict[str, Any] = dict(case.arguments)
        for key, tensor in buffers(case.arguments):
            size = tensor.numel() * tensor.element_size()
            found = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=position) if size else tensor
            position += size
            found = found.clone().view(tensor.dtype).reshape(tensor.shape)
            if key in arguments:
                arguments[key] = found
            else:
                name = key.rstrip("0123456789")
                arguments[name] = [*arguments[name]]
                arguments[name][int(key[len(name) :])] = found
        counts = torch.frombuffer(data, dtype=torch.uint8, count=40, offset=position).clone().view(torch.int64)
        position += 40
        results.append(Result(arguments, *counts.tolist()))
    assert position == len(data)
    return results


def buffers(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Tensors by name; a list's entries as name0, name1, ..."""
    found = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, list | tuple):
            found.extend((f"{name}{i}", entry) for i, entry in enumerate(value))
    return found


def write(file: Any, case: Case) -> None:
    state = next(value for value in case.arguments.values() if isinstance(value, Tensor))
    integers = {
        **dict(zip(("state", "batch", "probes"), reversed(state.shape), strict=False)),
        "dtype": DTYPE_NUMBERS[state.dtype],
        "seed": case.seed,
        **vars(case.limits),
    }
    if "values" in case.arguments:
        integers["slots"] = case.arguments["values"].shape[1]
    if "thetas" in case.arguments:
        integers["capacity"], integers["stored"] = case.arguments["thetas"].shape[1], len(case.arguments["steps"])
    if "basis" in case.arguments:
        integers["capacity"], integers["stored"] = case.arguments["gram"].shape[2], len(case.arguments["basis"])
    lines = [f"case {case.name}"]
    for name, value in {**integers, **case.arguments}.items():
        if isinstance(value, bool | int):
            lines.append(f"integer {name} {int(value)}")
        elif isinstance(value, float):
            lines.append(f"number {name} {value.hex()}")
    for name, tensor in buffers(case.arguments):
        offset = case.offset if tensor.dtype == state.dtype else 0
        lines.append(f"buffer {name} {tensor.numel() * tensor.element_size()} {offset}")
    file.write("\n".join([*lines, "data", ""]).encode())
    for _, tensor in buffers(case.arguments):
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
