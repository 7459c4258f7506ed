"""Find the CUDA compiler and choose the GPU architectures to compile for; setup.py calls this before CMake.

Switches, from the environment:

    PYDEQ_WITH_CUDA=0|1       never compile CUDA kernels, or fail if they cannot be compiled; by default they are
                              compiled if a toolkit is found, with or without a GPU
    TORCH_CUDA_ARCH_LIST      architectures, as for torch's own extensions: "8.0;9.0+PTX", "Hopper"
    CUDACXX, CUDA_HOME        the place of nvcc, if not on PATH
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST = (12, 8)
# Machine code for these, PTX for the second list: it serves GPUs newer than this build.
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
PTX = ("9.0", "12.0")
# The names that torch's extensions take.
FAMILIES = {
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class CudaError(Exception):
    """CUDA kernels cannot be compiled; the message says why."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler that can compile the kernels.

    Args:
        nvcc: Its path.
        version: Such as "13.0".
        archs: The architectures it knows, such as "9.0".
    """

    nvcc: str
    version: str
    archs: tuple[str, ...]


def find_nvcc(environment: Mapping[str, str]) -> str:
    """The path of nvcc: CUDACXX, then CUDA_HOME, then PATH, then the usual place; empty if there is none."""
    if named := environment.get("CUDACXX"):
        return shutil.which(named) or ""
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    for home in homes:
        if found := shutil.which(str(Path(home) / "bin" / "nvcc")):
            return found
    return shutil.which("nvcc", path=environment.get("PATH")) or shutil.which("/usr/local/cuda/bin/nvcc") or ""


def find_toolkit(environment: Mapping[str, str]) -> Toolkit:
    """The toolkit to compile with.

    Raises:
        CudaError: If there is none, or it is too old.
    """
    nvcc = find_nvcc(environment)
    if not nvcc:
        raise CudaError("no nvcc was found when pydeq was installed (CUDACXX, CUDA_HOME and PATH say where it is)")
    try:
        version = parse_version(_output(nvcc, "--version"))
        if version < OLDEST:
            raise CudaError(f"{nvcc} is of CUDA {dotted(version)}, and {dotted(OLDEST)} or later is needed")
        archs = parse_archs(_output(nvcc, "--list-gpu-arch"))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise CudaError(f"{nvcc} does not run: {error}") from error
    return Toolkit(nvcc, dotted(version), archs)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def parse_version(text: str) -> tuple[int, ...]:
    """Parse the output of ``nvcc --version``; for example (13, 0)."""
    match = re.search(r"release (\d+)\.(\d+)", text)
    if not match:
        raise ValueError(f"no release in {text!r}")
    return int(match[1]), int(match[2])


def parse_archs(text: str) -> tuple[str, ...]:
    """Parse the output of ``nvcc --list-gpu-arch``: ("8.0", "10.0") for compute_80 and compute_100."""
    return tuple(f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)\b", text))


def translate(text: str, known: Sequence[str]) -> str:
    """CMAKE_CUDA_ARCHITECTURES from a TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX" -> "80-real;90".

    Args:
        text: Architectures between semicolons, commas or spaces.
        known: The architectures that nvcc knows.

    Raises:
        ValueError: If one is malformed or unknown to nvcc.
    """
    for name, archs in FAMILIES.items():
        text = re.sub(rf"\b{name}\b(\+PTX)?", archs, text, flags=re.IGNORECASE)
    entries = [entry for entry in re.split(r"[;,\s]+", text) if entry]
    if not entries:
        raise ValueError("TORCH_CUDA_ARCH_LIST names no architecture: unset it, or write for example 9.0")
    chosen: dict[str, str] = {}
    for entry in entries:
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", entry)
        if not match or match[1] not in known:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must name architectures such as 8.0 or 9.0+PTX that nvcc knows"
                f" ({', '.join(known)}), got {entry!r}"
            )
        number = match[1].replace(".", "") + match[2]
        if match[3] or number not in chosen:
            chosen[number] = number if match[3] else f"{number}-real"
    return ";".join(chosen.values())


def default_archs(known: Sequence[str]) -> str:
    """The architectures of a wheel, without those that this nvcc does not know."""
    return translate(";".join(a + ("+PTX" if a in PTX else "") for a in ARCHS if a in known), known)


def local_archs(known: Sequence[str]) -> str:
    """The architectures of this machine's GPUs, for a developer's own build; 9.0 without GPUs."""
    try:
        found = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    here = sorted({capability for capability in found if capability in known})
    return translate(";".join(here or ["9.0"]), known)


def choose(environment: Mapping[str, str], local: bool) -> tuple[Toolkit, str]:
    """The toolkit to compile with, and for which architectures, as CMake names them.

    Args:
        environment: Its switches are above.
        local: Compile only for the GPUs of this machine; the environment can name other architectures.

    Raises:
        CudaError: If CUDA kernels are not to be compiled, or cannot be.
        ValueError: If a switch has an invalid value.
    """
    switch = environment.get("PYDEQ_WITH_CUDA", "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"PYDEQ_WITH_CUDA must be 0 or 1, got {switch!r}")
    if switch == "0":
        raise CudaError("PYDEQ_WITH_CUDA=0 was set when pydeq was installed")
    if environment.get("PYDEQ_SANITIZE"):
        raise CudaError("PYDEQ_SANITIZE was set when pydeq was installed, and sanitizers work on CPU kernels only")
    toolkit = find_toolkit(environment)
    if wanted := environment.get("TORCH_CUDA_ARCH_LIST"):
        return toolkit, translate(wanted, toolkit.archs)
    return toolkit, local_archs(toolkit.archs) if local else default_archs(toolkit.archs)


if __name__ == "__main__":
    try:
        toolkit, archs = choose(os.environ, local=False)
    except (CudaError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"{toolkit.nvcc}: CUDA {toolkit.version}, {archs}")
