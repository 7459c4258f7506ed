"""The header that csrc/generate_protocol.py writes from pydeq/protocol.py."""

import runpy
from enum import IntEnum
from pathlib import Path

import pytest

GENERATOR = Path(__file__).parent.parent / "csrc" / "generate_protocol.py"


@pytest.fixture(scope="module")
def generator():
    return runpy.run_path(str(GENERATOR))


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
    assert header.startswith("// Generated from pydeq/protocol.py")
