"""The environment of a measurement: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pydeq.ops.kernels import kernels

_ROOT = Path(__file__).parent.parent.parent


def environment(device: str) -> dict[str, Any]:
    """Return the facts as JSON holds them.

    Args:
        device: The device of the trainings: cpu or cuda.
    """
    commit, changed = _commit()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(), "torch": str(torch.__version__), "cuda": torch.version.cuda,
            "numpy": _version("numpy"), "pydeq": _version("pydeq"),
        },
        "kernels": asdict(kernels()),
    }  # fmt: skip


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the system's name of the processor."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of this checkout, and whether source files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(_ROOT), *arguments), capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if not (_ROOT / ".git").exists():  # a copy inside another repository
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "pydeq", "csrc", "experiments"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _load() -> float | None:
    """Return the load average of the last minute, which shows other work on the machine."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None
