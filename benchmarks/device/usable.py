"""Check whether the compiled kernels run on this GPU; if not, they must be compiled."""

from __future__ import annotations

import sys

import torch

import pydeq
from pydeq.ops import kernels


def main() -> int:
    facts = pydeq.kernels()
    print(facts)
    if not facts.cuda:
        print(f"no CUDA kernels run here: {facts.cuda_reason}", file=sys.stderr)
        return 1
    try:
        kernels.check_capability(torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
