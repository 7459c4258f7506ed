"""Every public class and function has an example in its docstring, which gives what it says.

Examples may use ``torch`` and ``pydeq`` without importing them.
"""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import pydeq

NAMES = (Path(__file__).parent / "public_names.txt").read_text(encoding="utf-8").split()
NAMES += [f"pydeq.compat.deq.{name}" for name in ("anderson", "broyden", "jac_loss_estimate", "power_method")]
NOT_SHOWN = "pydeq.compat.torchdeq.register"
"""Names that begin like this have no example: they would change tables that other tests use."""


def public_objects():
    """The public classes and functions, each under its first name."""
    found = {}
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        one = getattr(importlib.import_module(module), attribute)
        if (inspect.isclass(one) or inspect.isroutine(one)) and not name.startswith(NOT_SHOWN):
            found.setdefault(id(one), (name, one))
    return dict(found.values())


OBJECTS = public_objects()


@pytest.mark.parametrize("name", OBJECTS)
def test_example(name):
    text = inspect.getdoc(OBJECTS[name]) or ""
    case = doctest.DocTestParser().get_doctest(text, {"torch": torch, "pydeq": pydeq}, name, None, None)
    assert case.examples, f"the docstring of {name} needs an example: a section Examples with lines that begin with >>>"
    assert "\nExamples:\n    >>> " in text, "the site finds examples in a section of this name"
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = runner.run(case, out=report.append)
    assert not results.failed, "".join(report)
