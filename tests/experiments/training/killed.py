"""A process whose copies train, and are killed at a moment of choice; a script, see ``test_training_resumes.py``.

It reads requests, JSON a line: {"config": mapping, "out": folder, "event": number or null}. A copy of the process then
trains into the folder, going on from what is there, and is killed by SIGKILL at its event of that number: each step,
row, write to the disk and rename is one. The answer is how the copy ended: {"signal": number or null, "code": number or
null, "events": [names]}.
"""

import json
import os
import signal
import sys

import safetensors.torch
import torch

from experiments import training
from experiments.training.observers import Observer


class Moments(Observer):
    """Counts what happens, and kills the process at one of it.

    Args:
        last: The number of the event to die at; None for never.
        report: A file descriptor that the names go to.
    """

    def __init__(self, last, report):
        self.last, self.report, self.count = last, report, 0

    def happen(self, name):
        os.write(self.report, f"{name}\n".encode())
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def advanced(self, step):
        self.happen(f"step {step}")

    def stepped(self, row):
        self.happen(f"row {row.step}")

    def patch(self):
        """Make each write to the disk an event, before and, for tensors, in the middle of it."""
        fsync, replace, save_file = os.fsync, os.replace, safetensors.torch.save_file

        def watched_fsync(descriptor):
            self.happen("fsync")
            fsync(descriptor)

        def watched_replace(source, target):
            self.happen(f"replace {os.path.basename(source)} by {os.path.basename(target)}")
            replace(source, target)

        def watched_save_file(tensors, path, about):
            save_file(tensors, path, about)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            self.happen("half of the tensors")
            path.write_bytes(content)

        os.fsync, os.replace, safetensors.torch.save_file = watched_fsync, watched_replace, watched_save_file


def train(request, report):
    """What a copy of the process does."""
    moments = Moments(request["event"], report)
    moments.patch()
    config = training.training_config_from_mapping(request["config"])
    training.train(config, out=request["out"], resume=True, observers=[moments])


def serve():
    """Answer requests until there are no more."""
    torch.set_num_threads(1)  # threads do not survive in copies
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what each copy would import again, for a second
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reader)
                train(json.loads(line), writer)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as file:
            events = file.read().splitlines()
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status)
        answer = {
            "signal": os.WTERMSIG(status) if killed else None,
            "code": None if killed else os.WEXITSTATUS(status),
            "events": events,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
