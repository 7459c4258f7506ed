"""The environment of a run: machine, versions, commit, date."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pydeq
from benchmarks.profiles import Profile

_ROOT = Path(__file__).parent.parent
_CODE = (".py", ".cpp", ".h", ".cu", ".cuh", ".in", ".safetensors")


# Libraries, besides torch and the peers, that figures depend on.
LIBRARIES = (
    "numpy", "scikit-learn", "pytest-benchmark", "scipy", "xitorch", "jax", "jaxopt", "optimistix", "deepinv",
    "petsc4py",
)  # fmt: skip


def facts(profile: Profile, peers: Mapping[str, str], device: str = "cpu") -> dict[str, Any]:
    """All facts that a figure depends on, except the code of the suite.

    Args:
        profile: The size of the run.
        peers: Names and versions of the libraries compared.
        device: Where it runs, "cpu" or "cuda".
    """
    commit, changed = commit_and_changes()
    return {
        "profile": profile.name,
        "profile_sizes": dataclasses.asdict(profile),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "code": code(),
        "device": device,
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "cpu": cpu_name(),
        "cores": cores(),
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "threads": list(thread_counts(profile)),
        # Of suites that repeat with other seeds. Every other random number has a seed in the code.
        "seeds": {
            "nfe": list(range(profile.nfe_seeds)),
            "digits": list(range(profile.digits_seeds)),
            "differences": list(range(profile.differences_seeds)),
        },
        "peers": list(peers),
        "load_at_start": load(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: installed_version(name) for name in LIBRARIES},
            **peers,
        },
        "kernels": dataclasses.asdict(pydeq.kernels()),
    }


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts(profile: Profile) -> tuple[int, ...]:
    """The thread counts of the profile that this machine has enough cores for."""
    return tuple(count for count in profile.threads if count <= cores())


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit_and_changes(*paths: str) -> tuple[str | None, bool | None]:
    """The commit of this checkout, and whether files differ from it; None if this is not a checkout.

    Args:
        paths: Look for changes only here; everywhere by default.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(_ROOT), *arguments), capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if not (_ROOT / ".git").exists():  # a copy inside another repository
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *paths))
    except (OSError, subprocess.SubprocessError):
        return None, None


def code() -> str:
    """A hash of the code that measures and is measured: of pydeq, its kernels and this suite, without its reports."""
    digest = hashlib.sha256()
    folders = (_ROOT / name for name in ("pydeq", "csrc", "benchmarks"))
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in _CODE):
        name = path.relative_to(_ROOT)
        if name.parts[:2] not in (("benchmarks", "report"), ("benchmarks", "out")):
            digest.update(str(name).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cpu_name() -> str:
    """The system's name of the processor."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Size of each level of data cache, as the operating system reports it."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((index / entry).read_text().strip() for entry in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def load() -> float | None:
    """The load average of the last minute, which shows other work on the machine."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
