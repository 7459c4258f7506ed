"""What a build reads from the package: numbers in pydeq/ops/constants.py, the interface in pydeq/ops/interface.py."""

import runpy
from enum import IntEnum
from pathlib import Path

import pytest
import torch

import pydeq
from pydeq.ops import kernels

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def generator():
    return runpy.run_path(str(CSRC / "generate_constants.py"))


@pytest.fixture(scope="module")
def interface_generator():
    return runpy.run_path(str(CSRC / "generate_interface.py"))


def test_constants_keep_their_values(generator):
    class CounterColumn(IntEnum):
        FIRST = 0
        LAST = 7

    module = {"CounterColumn": CounterColumn, "IntEnum": IntEnum, "LIMIT": 0.1, "WINDOW": 10, "BIG": 1e300, "_x": 1}
    module["TERMS"] = (3, -0.5)
    assert generator["declarations"](module) == {
        "COUNTER_COLUMN_FIRST": ("int", "0"),
        "COUNTER_COLUMN_LAST": ("int", "7"),
        "COUNTER_COLUMN_SIZE": ("int", "2"),
        "LIMIT": ("double", "0.1"),
        "WINDOW": ("int64_t", "10"),
        "BIG": ("double", "1e+300"),
        "TERMS_0": ("int64_t", "3"),
        "TERMS_1": ("double", "-0.5"),
    }


def test_a_name_is_declared_once(generator):
    class Counter(IntEnum):
        SIZE = 5

    with pytest.raises(SystemExit, match="COUNTER_SIZE would be declared twice"):
        generator["declarations"]({"Counter": Counter})


def test_header_holds_every_constant(generator):
    header = generator["header"]({"LIMIT": ("double", "0.1")})
    assert "constexpr double LIMIT = 0.1;" in header
    assert header.startswith("// Generated from pydeq/ops/constants.py")


def test_a_build_reads_the_interface_that_the_package_has(interface_generator):
    """Without importing torch: from the sources of the operations."""
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pydeq::")]
    text = interface_generator["package_interface"](Path(pydeq.__file__).parent)
    assert text == kernels._interface()
    assert {part.split("=")[0] for part in text.split()} == {name[len("pydeq::") :] for name in registered} | {
        "constants"
    }


def test_schemas_are_read_from_the_sources(interface_generator):
    source = (
        'x = define("a(int x)"\n    " -> ()", f, g)\nother("b() -> ()")\ndefine\n'
        'y = StepOperation("c", "int y," " int z", f)\ndefine(text, f)\n'
    )
    assert interface_generator["schemas"](source, "{}({})".format) == ["a(int x) -> ()", "c(int y, int z)"]
