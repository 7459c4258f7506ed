"""Three steps of Anderson's method for Nsight Compute, between profiler marks: ``ncu --profile-from-start off ...``.

One step with a block per sample, one in half precision with a cluster per sample, and one in two launches.
"""

from __future__ import annotations

import torch

from benchmarks.device.first import STEPS_TIMED, forced, prepared_step

STEPS = (
    ("block", 128, 8192, torch.float32),
    ("cluster", 8, 65536, torch.bfloat16),
    ("split", 8, 131072, torch.float32),
)


def main() -> int:
    solver, before, _ = STEPS_TIMED["anderson"]
    for path, batch, dim, dtype in STEPS:
        with forced(path):
            step, reset = prepared_step(solver, before, batch, dim, dtype)
            for _ in range(3):
                reset()
                step()
            reset()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"profiled: anderson on the path {path}, ({batch}, {dim}), {dtype}", flush=True)
    return 0
