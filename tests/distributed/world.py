"""``World``: processes that form a gloo group and run functions that they are sent.

Nothing waits forever: a collective that its ranks do not all enter raises after ``COLLECTIVE`` seconds, and a function
that has not come back after ``LIMIT`` seconds, or ``PATIENCE`` seconds after it failed on another rank, costs the
processes their lives.
"""

import faulthandler
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import connection

import torch
import torch.distributed as dist
from torch import multiprocessing

SIZE = 2
COLLECTIVE = 60.0
LIMIT = 180.0
PATIENCE = 3.0


class World:
    """Processes started on first use, and again after one of them failed.

    Args:
        tmp_path_factory: Pytest's; the processes meet by a file, not by a port.
    """

    def __init__(self, tmp_path_factory):
        self.tmp_path_factory = tmp_path_factory
        self.processes, self.pipes, self.folder = [], [], None

    def run(self, function, *arguments):
        """What ``function(rank, *arguments)`` returns on each rank, in their order.

        Raises:
            AssertionError: If it raised on a rank, or did not come back; with the tracebacks.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        deadline = time.monotonic() + LIMIT
        results, failures, waiting = [None] * SIZE, [], list(range(SIZE))
        while waiting:
            ready = connection.wait([self.pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"no answer from ranks {waiting}")
                break
            for rank in [rank for rank in waiting if self.pipes[rank] in ready]:
                waiting.remove(rank)
                try:
                    results[rank], failure = self.pipes[rank].recv()
                except EOFError:
                    failure = self._end_of(rank)
                if failure:
                    failures.append(failure)
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        if failures:
            self.stop(kill=True)  # the ranks may be out of step
            raise AssertionError("\n".join(failures))
        return results

    def stop(self, kill=False):
        """End the processes."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            if not kill and process.is_alive():
                pipe.send(None)
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join(0.0 if kill else 10.0)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self.processes, self.pipes = [], []

    def _end_of(self, rank):
        """How a process ended that was to answer, and where it was if a signal ended it."""
        self.processes[rank].join(10.0)
        stacks = stacks_path(self.folder, rank).read_text()
        return f"rank {rank} ended by itself with exit code {self.processes[rank].exitcode}\n{stacks}"

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = self.tmp_path_factory.mktemp("world")
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)


def stacks_path(folder, rank):
    """Where a process that a signal ends leaves the stacks of its threads."""
    return folder / f"rank{rank}.stacks"


def serve(rank, folder, pipe):
    """The life of one process."""
    stacks = stacks_path(folder, rank).open("w")
    faulthandler.enable(stacks)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # as in pyproject.toml
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the host's name resolves to
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=COLLECTIVE),
    )
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((function(rank, *arguments), None))
        except BaseException:
            pipe.send((None, f"on rank {rank}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()
