"""Reads a schedule that libtpu dumped, a VLIW bundle a line, and finds its loops.

A line is a cycle: its number, a label where control flow meets, `>` for each loop around it, and operations in braces;
`{}` is a cycle in which nothing is issued. A loop is what a backward branch jumps over; four delay slots follow every
branch, fewer where a label comes first. A forward branch within a loop skips a part of it.

    0x47   : >> { %s1 = sld [smem:[#a]] (!%p8)  ;;  %s2 = smov.u32 0 }     /* Start region 40 */
    0x48 LB: >> { %66 = sbr.rel (!%p64) target bundleno = 44 (0x2c), region = 94 }
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass

DELAY_SLOTS = 4

_LINE = re.compile(r"^ *(0x[0-9a-f]+|0) +(LH|LB|LE|PB|PF|CT)? *: *(>[> ]*)?\{")
_BRANCH = re.compile(r"^sbr\.\S+.*?target (?:bundleno = (\d+)|= \$region(\d+))")
_REGION_STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
_COMMENT = re.compile(r"/\*(?!\w+=\*/).*?\*/", re.S)
"""Comments, but not the names of a DMA's operands."""
_RESULT = re.compile(r"^%\S+ = ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """What is issued in one cycle.

    Attributes:
        operations: Each with its operands, without its result.
        is_labelled: Whether control flow meets here.
        regions: Regions of the program that start here.
        jump: What is jumped to by a branch: ("bundle", number) or ("region", number).
    """

    operations: tuple[str, ...]
    is_labelled: bool
    regions: tuple[int, ...]
    jump: tuple[str, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """Cycles that a forward branch can jump over.

    Attributes:
        start: First.
        end: Last.
        own: Those that belong to the loop of the branch itself.
    """

    start: int
    end: int
    own: frozenset[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A loop as cycles of the schedule.

    Attributes:
        start: First cycle.
        end: Last cycle.
        depth: How many loops hold it.
        own: Its cycles without those of the loops inside it.
        skips: What forward branches within it can jump over, in order of the branches.
    """

    start: int
    end: int
    depth: int
    own: tuple[int, ...]
    skips: tuple[Skip, ...]


def read_bundles(text: str) -> list[Bundle]:
    """The bundles of a dump; the place in the list is the cycle.

    Raises:
        ValueError: Cycles are missing, so the format is not the one described above.
    """
    lines: list[list[str]] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is not None and int(match[1], 0) == len(lines):
            lines.append([line])
        elif lines:
            # A comment with a line break in it goes on.
            lines[-1].append(line)
    if not lines:
        raise ValueError("no bundles found; the dump's format has changed")
    return [_parse("\n".join(parts)) for parts in lines]


def find_loops(bundles: Sequence[Bundle]) -> list[Span]:
    """The loops, by their first cycle, outer before inner."""
    branches = _branches(bundles)
    labels = [cycle for cycle, bundle in enumerate(bundles) if bundle.is_labelled]
    ends: dict[int, int] = {}
    for cycle, target in branches:
        if target <= cycle:
            ends[target] = max(ends.get(target, 0), _settled(cycle, labels, len(bundles)))
    bounds = sorted(ends.items(), key=lambda bound: (bound[0], -bound[1]))
    return [_span(bound, bounds, branches, labels) for bound in bounds]


def _parse(line: str) -> Bundle:
    match = _LINE.match(line)
    assert match is not None
    body = _COMMENT.sub("", line[match.end() :])
    operations = tuple(_RESULT.sub("", part.strip()) for part in body.rpartition("}")[0].split(" ;; ") if part.strip())
    jump = None
    for operation in operations:
        branch = _BRANCH.match(operation)
        if branch is not None:
            jump = ("bundle", int(branch[1])) if branch[1] else ("region", int(branch[2]))
    regions = tuple(int(number) for number in _REGION_STARTS.findall(line))
    return Bundle(operations=operations, is_labelled=match[2] is not None, regions=regions, jump=jump)


def _branches(bundles: Sequence[Bundle]) -> list[tuple[int, int]]:
    """Cycle and target of each branch whose target is known."""
    region_at: dict[int, int] = {}
    for cycle, bundle in enumerate(bundles):
        for region in bundle.regions:
            region_at.setdefault(region, cycle)
    found = []
    for cycle, bundle in enumerate(bundles):
        if bundle.jump is not None:
            kind, number = bundle.jump
            target = number if kind == "bundle" else region_at.get(number)
            if target is not None:
                found.append((cycle, target))
    return found


def _settled(branch: int, labels: Sequence[int], num_cycles: int) -> int:
    """The last cycle that is issued after a branch whether it is taken or not."""
    following = bisect.bisect_right(labels, branch)
    before_label = labels[following] - 1 if following < len(labels) else num_cycles - 1
    return min(branch + DELAY_SLOTS, before_label)


def _span(
    bound: tuple[int, int],
    bounds: Sequence[tuple[int, int]],
    branches: Sequence[tuple[int, int]],
    labels: Sequence[int],
) -> Span:
    start, end = bound
    within = [other for other in bounds if other != bound and start <= other[0] and other[1] <= end]
    around = [other for other in bounds if other != bound and other[0] <= start and end <= other[1]]
    covered = {cycle for first, last in within for cycle in range(first, last + 1)}
    own = [cycle for cycle in range(start, end + 1) if cycle not in covered]
    mine = frozenset(own)
    skips = []
    for cycle, target in branches:
        if cycle in mine and cycle < target <= end + 1:
            first = _settled(cycle, labels, end + 1) + 1
            if first < target:
                skips.append(Skip(start=first, end=target - 1, own=mine.intersection(range(first, target))))
    return Span(start=start, end=end, depth=len(around), own=tuple(own), skips=tuple(skips))
