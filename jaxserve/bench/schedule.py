"""What the TPU compiler's own schedule says about a kernel: cycles, use of the slots, DMAs, spills, memory.

libtpu writes, on request, the schedule of every kernel it compiles: a line a VLIW bundle, in order of issue. `bundles`
reads such a text and finds the loops; this module gathers the files of a kernel and counts. No device is needed.

Cycles are issue cycles, empty bundles in which the scheduler waits for a known latency included (that is why the dump
`packed-bundles-post-ra` is read: later ones fold waiting away). What the schedule cannot know is not in them: waiting
for a DMA or a semaphore, bank conflicts, contention, trip counts. So they are a lower bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from jaxserve.bench.bundles import Bundle, Span, find_loops, read_bundles

GRANULE_BYTES = 32
"""What a DMA's size counts."""

ROWS: Mapping[str, int] = MappingProxyType({"f32": 8, "bf16": 16, "f8": 32, "s8": 32, "u8": 32})
"""Rows of a register that one matrix multiplication takes, by the type of its left side."""

SCHEDULE = "packed-bundles-post-ra"
SLOTS = "pre-delay_hlo-static-per-bundle-utilization"
ALLOCATIONS = "post-delay-converter"

WHOLE_PROGRAM = "TLP"
"""What the dumps call the program that calls the kernels."""

_FILE = re.compile(r"(?P<kernel>\d+-(?P<name>.+))-\d+-packed-bundles-post-ra\.txt$")
_ALLOCATION = re.compile(
    r"^\s*(?P<id>#allocation\w+) \[shape = '[^']*', space=(?P<space>\w+), size = (?P<size>0x[0-9a-f]+|\d+),"
    r" offset = (?P<offset>0x[0-9a-f]+|\d+),.*? tag = '(?P<tag>[^']*)",
    re.M,
)
_DMA_SIZE = re.compile(r"/\*size_in_granules=\*/(\S+?),")


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A part of a loop that can be skipped.

    Attributes:
        cycles: It takes, without loops inside it.
        dma_starts: DMAs it starts, those of loops inside it included.
    """

    cycles: int
    dma_starts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A loop of a kernel; everything counts one iteration, without the loops inside it.

    Attributes:
        start: First cycle in the kernel's text.
        end: Last cycle, the delay slots of the jump back included.
        depth: How many loops hold it.
        cycles: With the loops inside it, each once.
        own_cycles: Without them; bodies of branches count as executed.
        least_cycles: The same if every part that can be skipped is.
        branches: Those parts, in order; they may nest.
        empty_cycles: In which nothing is issued.
        used_slots: Slots taken, by kind.
        matmuls: Matrix multiplications, by the type of their left side.
        dma_starts: DMAs started.
        dma_waits: DMAs waited for.
        dma_bytes: Bytes those from HBM to VMEM bring; None if a size is known only at run time.
        spill_stores: Registers written to memory for lack of room.
        spill_fills: Registers read back.
    """

    start: int
    end: int
    depth: int
    cycles: int
    own_cycles: int
    least_cycles: int
    branches: tuple[Branch, ...]
    empty_cycles: int
    used_slots: Mapping[str, int]
    matmuls: Mapping[str, int]
    dma_starts: int
    dma_waits: int
    dma_bytes: int | None
    spill_stores: int
    spill_fills: int

    def steady_cycles(self, tile_dmas: int) -> int:
        """Own cycles of an iteration that starts the DMAs of one tile.

        A loop that fetches its first tile in a branch of its own holds those DMAs twice in its text, but no iteration
        runs both.

        Args:
            tile_dmas: DMAs of a tile.
        """
        cycles, surplus = self.own_cycles, self.dma_starts - tile_dmas
        for branch in self.branches:
            if 0 < branch.dma_starts <= surplus:
                cycles, surplus = cycles - branch.cycles, surplus - branch.dma_starts
        return cycles

    def mxu_fraction(self, *, array_size: int, flops_per_cycle: int) -> float:
        """Share of the matrix units' peak that is issued, padding included.

        Args:
            array_size: Rows (and columns) of a matrix unit.
            flops_per_cycle: Of all matrix units of a core, in bfloat16.
        """
        rows = sum(count * ROWS[kind] for kind, count in self.matmuls.items())
        return rows * array_size * array_size * 2 / (self.own_cycles * flops_per_cycle)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSchedule:
    """A compiled kernel.

    Attributes:
        name: As the compiler calls it.
        cycles: Of its text, each bundle once.
        loops: In order of their start.
        memory_bytes: Highest byte in use, by memory space ("vmem", "smem", ...).
        spilled_vectors: Vector registers spilled anywhere in the kernel.
    """

    name: str
    cycles: int
    loops: tuple[Loop, ...]
    memory_bytes: Mapping[str, int]
    spilled_vectors: int

    @property
    def hot_loop(self) -> Loop | None:
        """The innermost loop that multiplies matrices, where the time goes; None if none does.

        Of several such loops it is the shortest: the others do the same with what borders need besides.
        """
        multiplying = [loop for loop in self.loops if loop.matmuls]
        return min(multiplying, key=lambda loop: (-loop.depth, loop.own_cycles), default=None)

    @property
    def first_multiplying_loop(self) -> Loop | None:
        """The first innermost loop that multiplies, in the order of the text: whole tiles come before their borders."""
        multiplying = [loop for loop in self.loops if loop.matmuls]
        innermost = [
            loop
            for loop in multiplying
            if not any(loop.start <= other.start and other.end <= loop.end for other in multiplying if other != loop)
        ]
        return min(innermost, key=lambda loop: loop.start, default=None)


def read_kernels(folder: Path) -> list[KernelSchedule]:
    """Every kernel whose schedule was dumped into a folder, in the order of compilation.

    Only what Pallas compiled: XLA's own fusions are left out.
    """
    found = []
    for path in sorted(folder.iterdir()):
        match = _FILE.match(path.name)
        if match is not None and match["name"] != WHOLE_PROGRAM and _is_pallas(folder, match["kernel"]):
            found.append(read_kernel(folder, match["kernel"], match["name"]))
    return found


def read_kernel(folder: Path, prefix: str, name: str) -> KernelSchedule:
    """One kernel's files.

    Args:
        folder: Where the dumps are.
        prefix: What the names of its files start with.
        name: What to call it.
    """
    bundles = read_bundles(_dump(folder, prefix, SCHEDULE))
    capacity, used = _read_slots(_dump(folder, prefix, SLOTS))
    memory, vectors = _read_allocations(_dump(folder, prefix, ALLOCATIONS))
    if len(used) != len(bundles):
        raise ValueError(f"{name}: {len(bundles)} bundles but {len(used)} lines of slots; is this a new format?")
    return KernelSchedule(
        name=name,
        cycles=len(bundles),
        loops=tuple(_count(span, bundles, capacity, used) for span in find_loops(bundles)),
        memory_bytes=memory,
        spilled_vectors=vectors,
    )


def _is_pallas(folder: Path, prefix: str) -> bool:
    analysis = _files(folder, prefix, "schedule-analysis_final_bundles")
    return any("tpu_custom_call" in path.read_text(errors="replace") for path in analysis)


def _files(folder: Path, prefix: str, dump: str) -> Iterator[Path]:
    pattern = re.compile(re.escape(prefix) + r"-\d+-" + re.escape(dump) + r"\.txt$")
    return (path for path in sorted(folder.iterdir()) if pattern.match(path.name))


def _dump(folder: Path, prefix: str, dump: str) -> str:
    for path in _files(folder, prefix, dump):
        return path.read_text(errors="replace")
    raise ValueError(f"{prefix} has no dump {dump}; this libtpu names its dumps differently")


def _read_slots(text: str) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """Slots of a bundle by kind, and how many of each a cycle takes."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("==")]
    kinds = [kind.strip() for kind in lines[0].split(",")]
    capacity, *used = [tuple(int(number) for number in line.split()) for line in lines[1:]]
    return dict(zip(kinds, capacity, strict=True)), used


def _read_allocations(text: str) -> tuple[dict[str, int], int]:
    """Bytes by memory space, and how many vector registers are spilled."""
    memory: Counter[str] = Counter()
    spilled_vectors = 0
    for found in {match["id"]: match for match in _ALLOCATION.finditer(text)}.values():
        tag, space = found["tag"], found["space"]
        if tag.startswith("spilled") and space == "vmem":
            spilled_vectors += 1
        if "constant byte address" not in tag:
            memory[space] = max(memory[space], int(found["offset"], 0) + int(found["size"], 0))
    return dict(memory), spilled_vectors


def _count(span: Span, bundles: Sequence[Bundle], capacity: Mapping[str, int], used: Sequence[tuple[int, ...]]) -> Loop:
    own = [bundles[cycle] for cycle in span.own]
    operations = [operation for bundle in own for operation in bundle.operations]
    matmuls = Counter(_left_type(each.partition(" ")[0]) for each in operations if each.startswith("vmatmul"))
    sizes = [_dma_bytes(each) for each in operations if each.startswith("dma.hbm_to_vmem")]
    known = [size for size in sizes if size is not None]
    spills = [each for each in operations if "_spill]" in each]
    stores = sum(each.startswith(("vst", "sst")) for each in spills)
    skipped = frozenset[int]().union(*(skip.own for skip in span.skips))
    return Loop(
        start=span.start,
        end=span.end,
        depth=span.depth,
        cycles=span.end - span.start + 1,
        own_cycles=len(own),
        least_cycles=len(own) - len(skipped),
        branches=tuple(
            Branch(cycles=len(skip.own), dma_starts=_dma_starts(bundles[skip.start : skip.end + 1]))
            for skip in span.skips
        ),
        empty_cycles=sum(not bundle.operations for bundle in own),
        used_slots={kind: sum(used[c][index] for c in span.own) for index, kind in enumerate(capacity)},
        matmuls=dict(matmuls),
        dma_starts=_dma_starts(own),
        dma_waits=sum(each.startswith("dma.done") for each in operations),
        dma_bytes=sum(known) if len(known) == len(sizes) else None,
        spill_stores=stores,
        spill_fills=len(spills) - stores,
    )


def _dma_starts(bundles: Sequence[Bundle]) -> int:
    operations = (operation for bundle in bundles for operation in bundle.operations)
    return sum(each.startswith("dma.") and not each.startswith("dma.done") for each in operations)


def _left_type(name: str) -> str:
    """The type of a matrix multiplication's left side, from its name: `vmatmul.mubr.bf16.gmra.mxu0`."""
    for part in name.split("."):
        for kind in ROWS:
            if part.startswith(kind):
                return kind
    raise ValueError(f"{name} is a matrix multiplication of an unknown type")


def _dma_bytes(operation: str) -> int | None:
    match = _DMA_SIZE.search(operation)
    return int(match[1]) * GRANULE_BYTES if match is not None and match[1].isdigit() else None
