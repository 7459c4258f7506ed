"""A server that runs blocks of Python, each in a fork of this process: torch and pydeq are imported only once.

A request is a line of JSON on stdin: the code's file, and the folder to run it in. The answer is a line with the exit
status. The folder then has the files ``stdout`` and ``stderr``.
"""

import json
import os
import signal
import sys
import traceback
from types import ModuleType

import torch  # noqa: F401

import pydeq  # noqa: F401

SECONDS = 300
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def run(path: str, folder: str) -> int:
    """Run a file as a program of its own would run, for at most ``SECONDS``; return its exit status."""
    signal.alarm(SECONDS)  # ends this process
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, _FLAGS, 0o644), descriptor)
    sys.argv, sys.path[0] = [path], folder
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = path
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), vars(main))
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    for request in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(run(*json.loads(request)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
