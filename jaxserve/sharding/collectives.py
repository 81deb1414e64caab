"""What a compiled program exchanges between devices, read off its optimised HLO.

A collective inside a loop counts as often as the loop turns: a scanned decoder holds each of its layers' exchanges once
in the text. Loops whose turns the compiler does not know count once. Of an asynchronous pair the end counts, whose type
is the result alone; of a send or a receive the beginning, whose type is (what travels, u32[] context, token).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
"""Collectives that yield a result; HLO may write them as a pair, `-start` and `-done`."""

ONE_WAY = ("send", "recv")
"""What passes between two devices."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*\) -> .*)?\{$")
_COLLECTIVE = re.compile(rf"= (?P<type>.+?) (?:(?P<kind>{'|'.join(KINDS)})(?:-done)?|(?P<way>{'|'.join(ONE_WAY)}))\(")
_WHILE = re.compile(r"\bwhile\(.*condition=%?(?P<condition>[\w.-]+), body=%?(?P<body>[\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(?P<n>\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?(?P<name>[\w.-]+)")
# What a SparseCore does for the TensorCore stands in a computation that a custom call names.
_SEVERAL = re.compile(r"(?:branch_computations|called_computations)=\{(?P<names>[^}]*)\}")
_BOUND = re.compile(r"= s32\[\][^ ]* constant\((?P<n>\d+)\)")
_ARRAY = re.compile(r"\b(?P<dtype>pred|bf16|f8\w+|[fsuc]\d+)\[(?P<dims>[\d,]*)\]")

_WIDTHS = {"pred": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Exchanges of one kind and size.

    Attributes:
        kind: As HLO calls it, "all-reduce" for example.
        shape: Arrays of its result, as HLO writes them but for their layouts.
        count: How often a run of the program does it.
        num_bytes: Bytes of one result on one device.
    """

    kind: str
    shape: str
    count: int
    num_bytes: int


def collectives(hlo: str) -> tuple[Collective, ...]:
    """All collectives of a program, those of the same kind and shape together.

    Args:
        hlo: Text of the optimised module (`compiled.as_text()`).
    """
    bodies = dict(_computations(hlo.splitlines()))
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
    counts: dict[tuple[str, str], int] = {}

    def visit(name: str, times: int) -> None:
        for line in bodies[name][1]:
            if found := _COLLECTIVE.search(line):
                arrays = [array.group() for array in _ARRAY.finditer(found["type"])]
                key = (found["kind"] or found["way"], " ".join(arrays if found["kind"] else arrays[:-1]))
                counts[key] = counts.get(key, 0) + times
            elif loop := _WHILE.search(line):
                visit(loop["body"], times * _turns(line, bodies[loop["condition"]][1]))
            else:
                for inner in _called(line):
                    visit(inner, times)

    visit(entry, 1)
    return tuple(
        Collective(kind=kind, shape=shape, count=count, num_bytes=_bytes(shape))
        for (kind, shape), count in sorted(counts.items())
    )


def _computations(lines: Iterable[str]) -> Iterable[tuple[str, tuple[bool, list[str]]]]:
    """Each computation's name, whether it is the entry, and its lines."""
    name, body, is_entry = None, list[str](), False
    for line in lines:
        if name is None:
            if found := _COMPUTATION.match(line):
                name, body, is_entry = found["name"], [], line.startswith("ENTRY")
        elif line.startswith("}"):
            yield name, (is_entry, body)
            name = None
        else:
            body.append(line)


def _called(line: str) -> list[str]:
    """Computations that an instruction runs once."""
    names = [found["name"] for found in _CALLED.finditer(line)]
    if several := _SEVERAL.search(line):
        names += re.findall(r"[\w.-]+", several["names"])
    return names


def _turns(loop: str, condition: list[str]) -> int:
    """How often a loop turns: what the compiler wrote down, or the one constant its condition compares with."""
    if known := _TRIPS.search(loop):
        return int(known["n"])
    bounds = [int(found["n"]) for line in condition if (found := _BOUND.search(line))]
    return bounds[0] if len(bounds) == 1 else 1


def _bytes(shape: str) -> int:
    total = 0
    for found in _ARRAY.finditer(shape):
        dims = [int(dim) for dim in found["dims"].split(",") if dim]
        bits = _WIDTHS.get(found["dtype"]) or int(re.findall(r"\d+", found["dtype"])[0])
        total += math.prod(dims) * bits // 8
    return total
