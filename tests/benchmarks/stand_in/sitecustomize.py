"""A CPU that passes for a GPU, in every Python process that has this folder on PYTHONPATH.

What asks torch for "cuda" gets tensors of the CPU; streams and events do nothing; a graph records operations and calls
them again. Times mean nothing, all else runs as it is written. From the environment:

    STAND_IN_TINY=1        the sizes of benchmarks/device are small
    STAND_IN_CRASH=CASE    this case of benchmarks/device ends its process by a signal
    STAND_IN_FAULT=CASE    ... raises, and the device is in an error state from then on
    STAND_IN_HANG=CASE     ... never ends, and has two seconds
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import sys
import time
from importlib.abc import MetaPathFinder
from types import SimpleNamespace


class OnImport(MetaPathFinder):
    """Calls a function with a module once that is imported."""

    def __init__(self, **functions):
        self.functions = {name.replace("__", "."): function for name, function in functions.items()}

    def find_spec(self, name, path, target=None):
        if name not in self.functions:
            return None
        function = self.functions.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), function(module))
        return spec


def stand_in_for_cuda(torch):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    def on_cuda(argument):
        return str(argument).split(":")[0] == "cuda" if isinstance(argument, str | torch.device) else False

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            # A copy between devices is one.
            if func in (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.pin_memory):
                return args[0].clone()
            moves = func is torch.Tensor.to and any(map(on_cuda, (*args[1:], *kwargs.values())))
            args = tuple("cpu" if on_cuda(argument) else argument for argument in args)
            kwargs = {name: "cpu" if on_cuda(argument) else argument for name, argument in kwargs.items()}
            result = func(*args, **kwargs)
            return result.clone() if moves and result is args[0] else result

    class Graph:
        def __init__(self, keep_graph=False):
            self.calls = []

        def raw_cuda_graph(self):
            raise RuntimeError("no graph of a driver's")

        def replay(self):
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                if isinstance(result, torch.Tensor) and func._schema.returns[0].alias_info is None:
                    result.copy_(again)

    class Recording(TorchDispatchMode):
        def __init__(self, graph):
            super().__init__()
            self.graph = graph

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.graph.calls.append((func, args, kwargs or {}, result))
            return result

    class Profile(TorchDispatchMode):
        """Names of what a GPU would be given."""

        def __init__(self, activities):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += ["cudaLaunchKernel", *(["step_fused_kernel"] if func.namespace == "pydeq" else [])]
            return func(*args, **(kwargs or {}))

        def events(self):
            return [SimpleNamespace(name=name) for name in self.names]

    class Stream:
        cuda_stream = 0

        def wait_stream(self, other): ...

        def synchronize(self): ...

    class Event:
        def __init__(self, enable_timing=False):
            self.at = 0.0

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

        def synchronize(self): ...

    cuda = torch.cuda
    stream = Stream()
    properties = SimpleNamespace(
        name="a stand-in", major=9, minor=0, multi_processor_count=132, total_memory=2**30, L2_cache_size=2**25
    )
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda device=None: properties.name
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: properties
    cuda.set_sync_debug_mode = lambda mode: None
    cuda.synchronize = lambda device=None: None
    cuda.is_current_stream_capturing = lambda: False
    cuda._sleep = lambda cycles: time.sleep(cycles * 1e-9)
    cuda.current_stream = lambda device=None: stream
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, Graph, Recording
    cuda.stream = contextlib.nullcontext
    torch.profiler.profile = Profile
    cuda.profiler.start = cuda.profiler.stop = lambda: None
    OnTheCpu().__enter__()


def stand_in_for_kernels(pydeq):
    from pydeq.ops import kernels

    blocks = []

    def allocate(size):
        blocks.append((ctypes.c_char * size)())
        return ctypes.addressof(blocks[-1])

    real = kernels.kernels
    if not real().cpu:
        return
    kernels.kernels = pydeq.kernels = lambda: dataclasses.replace(
        real(), cuda=True, cuda_reason="", cuda_built="13.0", cuda_driver="13.0", cuda_archs=("9.0",)
    )
    kernels.check_capability = lambda capability, name: None
    kernels.allocate_pinned = allocate


def make_tiny(maps):
    if os.environ.get("STAND_IN_TINY"):
        maps.SHAPES, maps.SOLVED, maps.TRAINED, maps.CALLS = ((2, 33),), ((2, 8),), ((2, 8),), 5


def make_first_tiny(first):
    if os.environ.get("STAND_IN_TINY"):
        first.LAUNCHES, first.PATHS = 3, {"block": 9, "cluster": 33, "split": 65}


def make_overhead_tiny(overhead):
    if os.environ.get("STAND_IN_TINY"):
        overhead.COUNTED = ((2, 33),)


def take_one_measurement(timing):
    if os.environ.get("STAND_IN_TINY"):
        real = timing.alternate
        timing.alternate = lambda sides, *arguments, **options: real(sides, repeats=1, warmup=0)


def make_models_tiny(models):
    if os.environ.get("STAND_IN_TINY"):
        from pydeq.models import ConvDEQ, ConvDEQConfig, SolverConfig

        def make(device):
            import torch

            solver = SolverConfig(
                forward="anderson",
                backward="anderson",
                rtol=1e-3,
                max_steps=4,
                backward_rtol=1e-3,
                backward_max_steps=4,
            )
            config = ConvDEQConfig(image_channels=1, classes=3, channels=4, inner=4, groups=2, stride=2, solver=solver)
            model = ConvDEQ(config).to(device)
            images = torch.randn(2, 1, 8, 8).to(device)
            return model, lambda: model(images).square().mean()

        models.CASES = tuple(models.Case(key, key, make) for key in ("mdeq_tiny", "transformer"))


def spoil(worker):
    spoiled = {what: os.environ.get(f"STAND_IN_{what}") for what in ("CRASH", "FAULT", "HANG")}
    real = worker.work

    def crash():
        yield {"figure": 1.0}
        os.abort()

    def fault():
        import torch

        def synchronize(device=None):
            raise RuntimeError("CUDA error: misaligned address")

        torch.cuda.synchronize = synchronize
        yield {"figure": 2.0}
        synchronize()

    def hang():
        yield {"figure": 3.0}
        time.sleep(1000.0)

    def replaced(case):
        for what, run, limit in (("CRASH", crash, 30.0), ("FAULT", fault, 30.0), ("HANG", hang, 2.0)):
            if case.name == spoiled[what]:
                return dataclasses.replace(case, run=run, limit=limit)
        return case

    worker.work = lambda cases, *arguments: real([replaced(case) for case in cases], *arguments)


sys.meta_path.insert(
    0,
    OnImport(
        torch=stand_in_for_cuda,
        pydeq=stand_in_for_kernels,
        benchmarks__device__maps=make_tiny,
        benchmarks__device__first=make_first_tiny,
        benchmarks__device__overhead=make_overhead_tiny,
        benchmarks__device__worker=spoil,
        benchmarks__timing=take_one_measurement,
        benchmarks__suites__models=make_models_tiny,
    ),
)
