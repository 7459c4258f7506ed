"""The CPU kernels for aarch64, cross-compiled and run by qemu: they compute the same bits as the kernels here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_anderson_step
import test_broyden_step
import test_gmres_step
import test_picard_step
import test_squared_norm
import torch
from check_op import DTYPES, SCALES, compare, run
from emulated import FOLDER, ROOT, Case, run_program, run_quietly

from pydeq.ops.constants import Distribution

COMPILER = "aarch64-linux-gnu-g++"
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
MODULES = {
    "picard_step": test_picard_step,
    "anderson_step": test_anderson_step,
    "broyden_step": test_broyden_step,
    "gmres_step": test_gmres_step,
}

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not shutil.which(COMPILER) or not shutil.which(QEMU[0]),
        reason="needs g++ for aarch64 and qemu (Debian: g++-aarch64-linux-gnu, qemu-user)",
    ),
]


@pytest.fixture(scope="module")
def program() -> list[str]:
    """The command that runs cases with the kernels, compiled from the sources that are here."""
    folder, cmake = ROOT / "build" / "aarch64", cmake_command()
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "PYDEQ_PYTHON": sys.executable,
        "PYDEQ_WERROR": "1",
        "PYDEQ_KERNEL_RUNNER": "1",
    }
    run_quietly([cmake, "-S", str(ROOT), "-B", str(folder), *(f"-D{name}={value}" for name, value in options.items())])
    run_quietly([cmake, "--build", str(folder)])
    return [*QEMU, str(folder / "pydeq_run_kernels")]


def cmake_command() -> str:
    """The cmake of this environment, else the one on PATH."""
    here = Path(sys.executable).with_name("cmake")
    found = str(here) if here.exists() else shutil.which("cmake")
    if not found:
        pytest.skip("no cmake")
    return found


def check(program: list[str], cases: list[Case]) -> None:
    """Every case leaves what the kernels of this machine leave."""
    for index, (case, result) in enumerate(zip(cases, run_program(program, cases), strict=True)):
        names = list(case.arguments)
        expected = run(getattr(torch.ops.pydeq, case.name), names, tuple(case.arguments.values()))
        for name in names:
            compare(f"{case.name} {index}, {name}", result.arguments[name], expected[name], 0.0)


def steps(name: str, **options) -> list[Case]:
    """A case for each step of a solve."""
    module = MODULES[name]
    return [Case(name, dict(zip(module.NAMES, sample, strict=True))) for sample in module.steps(**options)]


@pytest.mark.parametrize("name", MODULES)
def test_steps(program, name):
    memory = {"picard_step": {"damping": 0.6}, "gmres_step": {"restart": 3}}.get(name, {"memory": 3})
    cases = []
    for dtype in DTYPES:
        cases += steps(name, dtype=dtype, dim=300, max_steps=8, **memory)
        cases += steps(name, dtype=dtype, dim=4100, batch=2, max_steps=3)
    for dtype, scale in SCALES:
        cases += steps(name, dtype=dtype, scale=scale, max_steps=5, dim=33)
    for size in (0, 1, 3, 31, 33):
        cases += steps(name, dim=size, batch=3, max_steps=3)
    check(program, cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norms(program, dtype):
    for probes, batch, size in [(1, 1, 0), (1, 3, 1), (3, 2, 33), (2, 3, 4095), (2, 2, 9000)]:
        x = test_squared_norm.inputs(probes * batch, size, dtype).view(probes, batch, size)
        y = x.new_full((batch,), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
        (result,) = run_program(program, [Case("squared_norm", {"x": x, "y": y})])
        compare(f"{(probes, batch, size)}", result.arguments["y"], torch.ops.pydeq.squared_norm(x), 0.0)


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_probes(program, dtype, distribution):
    cases = [
        Case(
            "random_probes",
            {
                "out": torch.full((2, 3, size), torch.nan, dtype=dtype),
                "key": torch.tensor(0x123456789ABCDEF0 + size),
                "distribution": int(distribution),
            },
        )
        for size in (1, 5, 128, 513, 2500)
    ]
    for case, result in zip(cases, run_program(program, cases), strict=True):
        out, key = case.arguments["out"], case.arguments["key"]
        expected = torch.ops.pydeq.random_probes(out[0], key, out.shape[0], int(distribution))
        compare(f"{tuple(out.shape)}", result.arguments["out"], expected, 0.0)


def test_host_memory(tmp_path):
    target = tmp_path / "memory"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    run_quietly([COMPILER, *flags, "-I", str(ROOT / "csrc"), str(FOLDER / "host" / "memory.cpp"), "-o", str(target)])
    done = subprocess.run([*QEMU, str(target)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
