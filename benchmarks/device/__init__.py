"""Measurements on a GPU: ``python -m benchmarks.device STAGE --out DIR``, as ``benchmarks/gpu_check.sh`` calls it.

A stage that measures is a list of cases. Each case yields rows of figures. A worker process runs the cases, and a
parent process without CUDA writes the rows to DIR/STAGE.jsonl one by one. After a fault on the device, a crash or a
case that takes too long, another worker runs the remaining cases.

    first      results compared with the CPU's on every path, then the smallest times: launch, report, step
    overhead   pydeq and its peers: overhead per iteration, solves, training steps, reference models
    captured   solves in a CUDA graph, replayed: their time without the host
    counters   three steps for Nsight Compute, between profiler marks
    usable     whether the compiled kernels run on this machine's GPU

    __main__.py   the command line
    parent.py     runs workers, writes rows; imports neither torch nor CUDA
    worker.py     runs cases
    clock.py      times and counts of work on the device
    maps.py       the sizes and maps that stages share
    summary.py    a short summary of a run
"""
