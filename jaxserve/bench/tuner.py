"""The tuner of tile sizes: from the heuristic's tiles, one field changed at a time, to tiles that no change improves.

What scores tiles is passed in: the schedule that the compiler makes of them, for a chip that need not be here, or the
clock of the device that is. Schedules tell neither waits for memory nor what the diagonal costs, so tiles count as
better only by more than `LEAST_GAIN`, and not at any size of program: compilers' and readers' time grows with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from rich.table import Table

from jaxserve.bench.tiled_kernels import core_of, sizes_of, tiled_kernel
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.pallas.tuning import Table as TunedTable
from jaxserve.pallas.tuning import Tiles, Tuned
from jaxserve.sharding.chips import Chip

LEAST_GAIN = 1.03
"""Tiles that beat the heuristic's by less are not worth an entry in a table."""

MAX_GROWTH = 1.5
"""Most bundles of a kernel, in those that it has with the heuristic's tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What tiles are worth.

    Attributes:
        cost: Time, in any unit that is the same for all tiles of a problem.
        bundles: Of the kernel's text; 0 where it is not known.
        compile_s: The compiler took.
    """

    cost: float
    bundles: int
    compile_s: float


Scorer: TypeAlias = Callable[[str, AttentionShape, Tiles], Score | None]
"""Scores tiles of a problem, given its name and itself; None if they cannot be compiled or run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What tuning a problem came to.

    Attributes:
        shape: Name of the problem.
        kernel: In tables of tuned tiles.
        problem: What those call the problem.
        heuristic: Its tiles.
        best: The best tiles; the heuristic's if none are better by far enough.
        gain: Cost of the heuristic's tiles over that of the best.
        tried: Tiles that were scored, and their cost over that of the heuristic's; None for those that failed.
    """

    shape: str
    kernel: str
    problem: str
    heuristic: Tiles
    best: Tiles
    gain: float
    tried: Sequence[tuple[Tiles, float | None]]

    def as_json(self) -> dict[str, object]:
        """All of it."""
        return asdict(self)


def tune(name: str, shape: AttentionShape, chip: Chip, score: Scorer) -> Tuning:
    """Looks for the best tiles of a problem.

    Args:
        name: The problem's.
        shape: The problem.
        chip: What it runs on.
        score: Says what tiles are worth.

    Raises:
        NotImplementedError: The kernel cannot do it at all.
        ValueError: The heuristic's tiles cannot be compiled or run.
    """
    kernel, sizes, core = tiled_kernel(shape), sizes_of(shape), core_of(chip)
    heuristic = best = kernel.heuristic(sizes, core)
    first = score(name, shape, asdict(heuristic))
    if first is None:
        raise ValueError(f"{name}: the heuristic's tiles, {heuristic}, cannot be compiled or run")
    scores: dict[Any, Score | None] = {heuristic: first}
    lowest, improves = first.cost, True
    while improves:
        improves = False
        for tiles in kernel.neighbours(sizes, core, best):
            if tiles not in scores:
                scores[tiles] = found = score(name, shape, asdict(tiles))
                if found is not None and found.cost < lowest and found.bundles <= first.bundles * MAX_GROWTH:
                    best, lowest, improves = tiles, found.cost, True
    if first.cost / lowest <= LEAST_GAIN:
        best, lowest = heuristic, first.cost
    return Tuning(
        shape=name,
        kernel=kernel.name,
        problem=sizes.problem,
        heuristic=asdict(heuristic),
        best=asdict(best),
        gain=first.cost / lowest,
        tried=[(asdict(tiles), None if each is None else each.cost / first.cost) for tiles, each in scores.items()],
    )


def merged(table: TunedTable, tunings: Sequence[Tuning], by: str) -> TunedTable:
    """A table with what was found instead of what it held for these problems; without a gain there is no entry.

    Args:
        table: Of the chip, as it was.
        tunings: What was found.
        by: How.
    """
    new: dict[str, dict[str, Tuned]] = {kernel: dict(problems) for kernel, problems in table.items()}
    for each in tunings:
        problems = new.setdefault(each.kernel, {})
        problems.pop(each.problem, None)
        if each.best != each.heuristic:
            problems[each.problem] = Tuned(by=by, gain=each.gain, tiles=each.best)
    return new


def table(title: str, tunings: Sequence[Tuning]) -> Table:
    """A line a problem."""
    grid = Table(title=title, title_justify="left")
    for name in ("problem", "kernel", "heuristic", "change"):
        grid.add_column(name)
    for name in ("gain", "tried"):
        grid.add_column(name, justify="right")
    for each in tunings:
        changed = {field: value for field, value in each.best.items() if value != each.heuristic[field]}
        grid.add_row(
            each.shape,
            each.kernel,
            _words(each.heuristic),
            _words(changed) or "none",
            f"{each.gain:.2f}",
            f"{len(each.tried)}",
        )
    return grid


def _words(tiles: Mapping[str, int | bool | None]) -> str:
    return ", ".join(f"{field} {value}" for field, value in tiles.items())
