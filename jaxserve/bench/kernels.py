"""Attention kernels read from their schedules: ours beside JAX's own, for a TPU that need not be here.

Each kernel is compiled in a process of its own with libtpu's dumps on. Of its KV loop the report takes the cycles of
one iteration and sets them against the time that fetching the iteration's keys and values takes at the memory's
bandwidth: below 1 the loop waits for memory, which is all a decode can do; above 1 it is bound by what it computes.
For prefill the figure is the share of the chip's peak that the operations that count would reach.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxserve.bench.kernel_names import ARRAY_SIZE, DECODES_ONLY, OURS
from jaxserve.bench.schedule import KernelSchedule, Loop, read_kernels
from jaxserve.bench.tiled_kernels import Work
from jaxserve.bench.tuner import Score, Scorer
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.pallas.tuning import Tiles
from jaxserve.sharding.chips import Chip
from jaxserve.sharding.topology import Topology, run_deviceless

MATRIX_UNITS = 4
"""Of a core: what the published peaks come to at the clocks the chips have."""

MIB = 1 << 20

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """One TensorCore of a chip.

    Attributes:
        array_size: Rows of a matrix unit.
        flops_per_cycle: In bfloat16.
        cycles_per_s: Its clock: the published peak divided by the operations of a cycle.
        bytes_per_s: Its share of the memory's bandwidth.
    """

    array_size: int
    flops_per_cycle: int
    cycles_per_s: float
    bytes_per_s: float

    @classmethod
    def of(cls, chip: Chip) -> Core:
        """The core of a kind of chip.

        Raises:
            ConfigError: It is no TPU.
        """
        if chip.name not in ARRAY_SIZE:
            raise ConfigError(f"Schedules are read for TPUs ({', '.join(ARRAY_SIZE)}), not for {chip.name}.")
        size = ARRAY_SIZE[chip.name]
        flops = MATRIX_UNITS * size * size * 2
        return cls(
            array_size=size,
            flops_per_cycle=flops,
            cycles_per_s=chip.peak_flops("bfloat16") / chip.cores / flops,
            bytes_per_s=chip.hbm_bytes_per_s / chip.cores,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticReport:
    """What a kernel's schedule says; times are of one iteration of its KV loop.

    Attributes:
        kernel: Its name.
        shape: Name of the problem.
        compile_s: The compiler took.
        compile_cpu_s: Of processors, all threads together; where others use them, the better figure.
        compute_s: Of issue cycles, a lower bound.
        fetch_s: Of its keys and values at the memory's bandwidth.
        useful_fraction: Of peak, operations without padding.
        issued_fraction: Of peak, operations with padding.
        cycles: Of an iteration.
        border_cycles: Of what the ends of sequences take besides, its share; None if the kernel's are not known.
        dma_starts: Of an iteration.
        loop_spills: Spilled registers stored in an iteration.
        spilled_vectors: In all of the kernel.
        vmem_bytes: Highest byte in use.
        smem_bytes: Highest byte in use.
        temp_bytes: HBM that the program needs besides arguments and results.
        bundles: Of the kernel's text.
    """

    kernel: str
    shape: str
    compile_s: float
    compile_cpu_s: float
    compute_s: float
    fetch_s: float
    useful_fraction: float
    issued_fraction: float
    cycles: int
    border_cycles: float | None
    dma_starts: int
    loop_spills: int
    spilled_vectors: int
    vmem_bytes: int
    smem_bytes: int
    temp_bytes: int
    bundles: int

    @property
    def compute_to_fetch(self) -> float:
        """Time to compute over time to fetch."""
        return self.compute_s / self.fetch_s

    @property
    def whole_to_fetch(self) -> float | None:
        """The same with the share of what the ends of sequences take."""
        if self.border_cycles is None:
            return None
        return self.compute_to_fetch * (1 + self.border_cycles / self.cycles)

    @property
    def time_over_peak(self) -> float:
        """Time to compute, ends of sequences included, over the time that its operations take at the chip's peak."""
        return (1 + (self.border_cycles or 0) / self.cycles) / self.useful_fraction

    def as_json(self) -> dict[str, object]:
        """All figures."""
        ratios = {"compute_to_fetch": self.compute_to_fetch, "whole_to_fetch": self.whole_to_fetch}
        return {**asdict(self), **ratios}


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A kernel that could not be compiled for a problem.

    Attributes:
        kernel: Its name.
        shape: Name of the problem.
        reason: Why.
    """

    kernel: str
    shape: str
    reason: str

    def as_json(self) -> dict[str, object]:
        """What failed and why."""
        return asdict(self)


def report_kernels(
    topology: Topology,
    kernels: Sequence[str],
    shapes: Mapping[str, AttentionShape],
    progress: Callable[[str, int, int], None],
) -> list[StaticReport | Failure]:
    """Compiles every kernel for every problem and reads its schedule; one that fails is reported as such.

    Args:
        topology: What to compile for; one of its devices is used.
        kernels: Names, see `kernel_programs.LOWERINGS`.
        shapes: Problems by name.
        progress: Told what is being done, how much is done, and how much there is.

    Raises:
        ConfigError: The compiler is missing, or the topology is no TPU's.
    """
    Core.of(topology.chip)
    what = f"Compiling for {topology}"
    cases = [
        (name, kernel) for name in shapes for kernel in kernels if shapes[name].is_decode or kernel not in DECODES_ONLY
    ]
    reports: list[StaticReport | Failure] = []
    progress(what, 0, len(cases))
    for name, kernel in cases:
        reports.append(report_kernel(topology, kernel, name, shapes[name]))
        progress(what, len(reports), len(cases))
    return reports


def report_kernel(
    topology: Topology, kernel: str, name: str, shape: AttentionShape, tiles: Tiles | None = None
) -> StaticReport | Failure:
    """Compiles a kernel for a problem and reads its schedule.

    Args:
        topology: What to compile for; one of its devices is used.
        kernel: Its name.
        name: The problem's.
        shape: The problem.
        tiles: Tile sizes of ours; None for those that a call takes.

    Raises:
        ConfigError: The compiler is missing, or the topology is no TPU's.
    """
    core = Core.of(topology.chip)
    with tempfile.TemporaryDirectory(prefix="jaxserve-schedule-") as folder:
        request = {"kernel": kernel, "shape": asdict(shape), "topology": str(topology), "tiles": tiles and dict(tiles)}
        variables = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        try:
            answer = run_deviceless(topology, "jaxserve.bench.kernel_worker", request, variables=variables)
            schedule = find_kernel(read_kernels(Path(folder)), answer["kernel"])
        except ConfigError:
            raise
        except (JaxserveError, ValueError) as error:
            return Failure(kernel=kernel, shape=name, reason=str(error))
    return summarise(kernel, name, schedule, answer, core)


def score_tiles(topology: Topology) -> Scorer:
    """A `tuner.Scorer` that reads schedules: time to compute, ends of sequences included.

    Args:
        topology: What to compile for.
    """

    def score(name: str, shape: AttentionShape, tiles: Tiles) -> Score | None:
        report = report_kernel(topology, OURS, name, shape, tiles)
        if isinstance(report, Failure):
            _LOGGER.info("%s, %s: %s", name, tiles, report.reason)
            return None
        _LOGGER.info("%s, %s: %.4f of peak", name, tiles, 1 / report.time_over_peak)
        return Score(cost=report.time_over_peak, bundles=report.bundles, compile_s=report.compile_s)

    return score


def find_kernel(schedules: Sequence[KernelSchedule], part: str) -> KernelSchedule:
    """The kernel whose name has a part.

    Raises:
        ValueError: There is none.
    """
    for schedule in schedules:
        if part in schedule.name:
            return schedule
    raise ValueError(f"no kernel called {part} was compiled, only {', '.join(s.name for s in schedules) or 'none'}")


def summarise(kernel: str, shape: str, schedule: KernelSchedule, answer: Mapping[str, Any], core: Core) -> StaticReport:
    """The figures of one iteration of a kernel's KV loop.

    Args:
        kernel: Its name.
        shape: Name of the problem.
        schedule: What was compiled.
        answer: Of `kernel_worker`.
        core: What it was compiled for.

    Raises:
        ValueError: The kernel has no loop that multiplies matrices.
    """
    work = Work(**answer["work"])
    hot = schedule.hot_loop if work.hot_trips == 1 else schedule.first_multiplying_loop
    if hot is None:
        raise ValueError(f"{schedule.name} has no loop that multiplies matrices")
    cycles = tile_cycles(schedule, hot, work)
    seconds = cycles / core.cycles_per_s
    issued = hot.mxu_fraction(array_size=core.array_size, flops_per_cycle=core.flops_per_cycle)
    return StaticReport(
        kernel=kernel,
        shape=shape,
        compile_s=answer["compile_s"],
        compile_cpu_s=answer["compile_cpu_s"],
        compute_s=seconds,
        fetch_s=work.tile_bytes / core.bytes_per_s,
        useful_fraction=work.tile_flops / (cycles * core.flops_per_cycle),
        issued_fraction=issued * hot.own_cycles * work.hot_trips / cycles,
        cycles=cycles,
        border_cycles=border_cycles(schedule, hot, work) if work.tile_ends else None,
        dma_starts=work.tile_dmas,
        loop_spills=hot.spill_stores,
        spilled_vectors=schedule.spilled_vectors,
        vmem_bytes=schedule.memory_bytes.get("vmem", 0),
        smem_bytes=schedule.memory_bytes.get("smem", 0),
        temp_bytes=answer["temp_bytes"],
        bundles=schedule.cycles,
    )


def tile_cycles(schedule: KernelSchedule, hot: Loop, work: Work) -> int:
    """Cycles of an iteration of the KV loop.

    That is the hot loop itself, or the loop around it if a tile takes several iterations of the hot loop. Then the
    loops beside it count too, each as often as the kernel's tiles say: one that starts DMAs and one that awaits them,
    once a page, and one that stores vectors and multiplies nothing, which unpacks.

    Args:
        schedule: The kernel.
        hot: Its hot loop.
        work: Of an iteration.
    """
    around = [loop for loop in schedule.loops if loop != hot and loop.start <= hot.start and hot.end <= loop.end]
    if work.hot_trips == 1 or not around:
        return hot.steady_cycles(work.tile_dmas)
    outer = max(around, key=lambda loop: loop.depth)
    beside = [
        loop for loop in schedule.loops if outer.start < loop.start and loop.end <= outer.end and not loop.matmuls
    ]
    starts = [loop.own_cycles for loop in beside if loop.dma_bytes]
    waits = [loop.own_cycles for loop in beside if loop.dma_waits and not loop.dma_starts]
    unpacks = [
        loop.own_cycles
        for loop in beside
        if loop.used_slots.get("VSTORE", 0) and not loop.dma_starts and not loop.dma_waits
    ]
    return (
        outer.own_cycles
        + hot.own_cycles * work.hot_trips
        + work.tile_dmas * (max(starts, default=0) + max(waits, default=0))
        + work.unpack_trips * min(unpacks, default=0)
    )


def border_cycles(schedule: KernelSchedule, hot: Loop, work: Work) -> float:
    """Cycles that the ends of sequences take besides, an iteration of the KV loop's share of them.

    They are in loops inside the hot loop: one with branches looks at each item of an iteration that has an end, and its
    branches run for the items that end a sequence; the others run once a sequence.

    Args:
        schedule: The kernel.
        hot: Its hot loop, the KV loop itself.
        work: Of an iteration.
    """
    inside = [loop for loop in schedule.loops if loop.depth == hot.depth + 1 and hot.start <= loop.start <= hot.end]
    cycles = 0.0
    for loop in inside:
        if loop.branches:
            looked = min(1.0, work.tile_ends) * work.tile_items
            cycles += looked * loop.least_cycles + work.tile_ends * (loop.own_cycles - loop.least_cycles)
        else:
            cycles += work.tile_ends * loop.own_cycles
    return cycles


def table(topology: Topology, reports: Sequence[StaticReport | Failure]) -> Table:
    """A line a kernel and problem."""
    grid = Table(title=f"{topology}: an iteration of the KV loop, bfloat16", title_justify="left")
    grid.add_column("problem")
    grid.add_column("kernel")
    for name in ("compute us", "fetch us", "ratio", "whole", "useful", "spills", "DMAs", "VMEM MiB", "compile s"):
        grid.add_column(name, justify="right")
    last = None
    for report in reports:
        if last is not None and report.shape != last:
            grid.add_section()
        shown, last = "" if report.shape == last else report.shape, report.shape
        if isinstance(report, Failure):
            grid.add_row(shown, report.kernel, *["-"] * 9)
            continue
        grid.add_row(
            shown,
            report.kernel,
            f"{report.compute_s * 1e6:.2f}",
            f"{report.fetch_s * 1e6:.2f}",
            f"{report.compute_to_fetch:.2f}",
            "-" if report.whole_to_fetch is None else f"{report.whole_to_fetch:.2f}",
            f"{report.useful_fraction:.2f}",
            f"{report.loop_spills}",
            f"{report.dma_starts}",
            f"{report.vmem_bytes / MIB:.1f}",
            f"{report.compile_s:.1f}",
        )
    return grid
