"""Tuned tile sizes: small JSON files, one a chip, that a tuner writes and the choice of tiles reads.

    tuned/<chip>.json: kernel -> problem -> {"by": how it was found, "gain": over the heuristic, "tiles": sizes}

A file holds only what beats a kernel's heuristic; where it has no entry, or an entry's tiles do not fit the call at
hand, the heuristic decides. `jaxserve bench tune --write` makes the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Tiles: TypeAlias = Mapping[str, int | bool | None]
"""Fields of a kernel's frozen tile sizes."""

FOLDER = Path(__file__).parent / "tuned"
"""Where the files are that come with the package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What was found for a problem.

    Attributes:
        by: How: what measured it, and the compiler's version.
        gain: Time with the heuristic's tiles over time with these.
        tiles: The sizes.
    """

    by: str
    gain: float
    tiles: Tiles


Table: TypeAlias = Mapping[str, Mapping[str, Tuned]]
"""By kernel and problem."""


def read_tuned(chip: str, folder: Path = FOLDER) -> Table:
    """What is tuned for a chip; nothing if it has no file.

    Args:
        chip: Its name, as topologies call it.
        folder: Where the files are.
    """
    path = folder / f"{chip}.json"
    if not path.is_file():
        return {}
    kernels = json.loads(path.read_text())
    return {
        kernel: {problem: Tuned(**entry) for problem, entry in problems.items()} for kernel, problems in kernels.items()
    }


def tuned_tiles(chip: str | None, kernel: str, problem: str) -> Tiles | None:
    """The tiles that come with the package for a problem, if any do.

    Args:
        chip: Its name; None where there is none, as in an interpreter.
        kernel: Name of the kernel.
        problem: What the kernel calls the problem.
    """
    found = None if chip is None else read_tuned(chip).get(kernel, {}).get(problem)
    return None if found is None else found.tiles


def write_tuned(chip: str, table: Table, folder: Path = FOLDER) -> Path:
    """Writes a chip's file, sorted, and returns its path.

    Args:
        chip: Its name.
        table: All of the file.
        folder: Where the files are.
    """
    plain = {
        kernel: {
            problem: {"by": each.by, "gain": round(each.gain, 3), "tiles": dict(each.tiles)}
            for problem, each in problems.items()
        }
        for kernel, problems in table.items()
        if problems
    }
    path = folder / f"{chip}.json"
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    return path
