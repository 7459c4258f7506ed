"""The environment of a measurement: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.environment import commit_and_changes, cores, cpu_name, installed_version, load
from pydeq.ops.kernels import kernels


def environment(device: str) -> dict[str, Any]:
    """Return the facts as JSON holds them.

    Args:
        device: The device of the trainings: cpu or cuda.
    """
    commit, changed = commit_and_changes("pydeq", "csrc", "experiments")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(), "torch": str(torch.__version__), "cuda": torch.version.cuda,
            "numpy": installed_version("numpy"), "pydeq": installed_version("pydeq"),
        },
        "kernels": asdict(kernels()),
    }  # fmt: skip
