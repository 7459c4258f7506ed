"""The memory loads in a kernel's machine code, from the listing of a cubin by ``nvdisasm -c``.

A GPU issues the instructions of a warp in order. A load does not stop the warp. The first instruction that reads a
loaded register stops it until that load has arrived. So the loads before such a read are under way at once, and more of
them hide more of the memory's latency.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDE = 128  # bits of the loads that are counted: a pack of a row. Narrower ones read counters, plans and row ends.

_FUNCTION = re.compile(r"^\.text\.(\w+):")
_LABEL = re.compile(r"^(\.L\w*):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L\w*)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_ENDS = ("EXIT", "RET", "BRX", "JMX")
_WRITE_NO_REGISTER = ("ST", "STG", "STS", "STL", "RED", "REDG", "ISETP", "FSETP", "DSETP", "HSETP2")


@dataclass(frozen=True)
class Instruction:
    """One line of a listing.

    Args:
        predicated: Whether it runs only if a predicate holds.
        opcode: Such as "LDG.E.128".
        operands: As printed.
    """

    predicated: bool
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.split(".", 1)[0]

    def reads(self) -> set[int]:
        """Registers that are named as sources; of a wider source the first one."""
        return {int(number) for number in _REGISTER.findall(self._sources())}

    def loads(self) -> set[int]:
        """Registers that a global load fills."""
        if self.kind != "LDG":
            return set()
        match = re.match(r"(?:U?P\w+,\s*)?R(\d+)\b", self.operands)
        return set(range(int(match[1]), int(match[1]) + max(1, self.width() // 32))) if match else set()

    def width(self) -> int:
        """Bits that a load brings to each thread."""
        wide = re.search(r"\.(64|128|256)\b", self.opcode)
        return int(wide[1]) if wide else 32

    def _sources(self) -> str:
        if self.kind in _WRITE_NO_REGISTER:
            return self.operands
        # The destination comes first, after predicates that are written too.
        parts = re.split(r",(?![^\[]*\])", self.operands)
        while parts and re.fullmatch(r"\s*U?P\w+\s*", parts[0]):
            parts.pop(0)
        return ",".join(parts[1:])


@dataclass
class Function:
    """A kernel's instructions in order, and the possible successors of each."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def successors(self, at: int, converging: dict[str, str]) -> Iterator[int]:
        """Places after instruction ``at``; ``converging`` has the target of each convergence barrier seen so far."""
        instruction = self.code[at]
        target = _TARGET.search(instruction.operands)
        if instruction.kind == "BSSY" and target:
            converging[instruction.operands.split(",", 1)[0].strip()] = target[1]
        elif instruction.kind == "BSYNC" and (name := converging.get(instruction.operands.strip())):
            yield self.labels[name]
            return
        elif instruction.kind == "BRA" and target:
            yield self.labels[target[1]]
            # "BRA.U !UP0, target" has its condition among the operands.
            if not instruction.predicated and instruction.operands.startswith("`"):
                return
        elif instruction.kind in _ENDS and not instruction.predicated:
            return
        yield at + 1


def parse(listing: str) -> list[Function]:
    """The kernels of a listing of nvdisasm.

    Raises:
        ValueError: If there is none.
    """
    functions: list[Function] = []
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            functions.append(Function(match[1]))
        elif not functions:
            continue
        elif match := _LABEL.match(line):
            functions[-1].labels[match[1]] = len(functions[-1].code)
        elif match := _INSTRUCTION.match(line):
            functions[-1].code.append(Instruction(bool(match[1]), match[2], match[3]))
    functions = [function for function in functions if function.code]
    if not functions:
        raise ValueError(f"no kernel in this listing of nvdisasm: {listing[:200]!r}")
    return functions


def loads_under_way(function: Function) -> list[int]:
    """For each wide load of a kernel, the number of wide loads from it until the first use of a loaded register.

    Of all paths of control, the path with the most loads counts; loops are not repeated.
    """
    converging: dict[str, str] = {}
    edges = [list(function.successors(at, converging)) for at in range(len(function.code))]
    reads = [instruction.reads() for instruction in function.code]
    fills = [instruction.loads() for instruction in function.code]
    wide = [bool(fills[at]) and function.code[at].width() >= WIDE for at in range(len(function.code))]
    return [_from(start, edges, reads, fills, wide) for start in range(len(wide)) if wide[start]]


def _from(start: int, edges: list[list[int]], reads: list[set[int]], fills: list[set[int]], wide: list[bool]) -> int:
    states: dict[int, tuple[int, frozenset[int]]] = {start: (0, frozenset())}  # wide loads so far, registers awaited
    most = 0
    for at in range(start, len(edges)):
        if at not in states:
            if not states or max(states) < at:
                break
            continue
        count, awaited = states.pop(at)
        if reads[at] & awaited:
            continue
        count += wide[at]
        most = max(most, count)
        awaited |= fills[at]
        for follower in edges[at]:
            if follower > at and (follower not in states or states[follower][0] < count):
                states[follower] = (count, awaited)
    return most
