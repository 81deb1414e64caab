"""Attention kernels read from their schedules: ours beside JAX's own, for a TPU that need not be here.

Each kernel is compiled in a process of its own with libtpu's dumps on. Of its KV loop the report takes the cycles of
one iteration and sets them against the time that fetching the iteration's keys and values takes at the memory's
bandwidth: below 1 the loop waits for memory, which is all a decode can do; above 1 it is bound by what it computes.
For prefill the figure is the share of the chip's peak that the operations that count would reach.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxserve.bench.kernel_names import ARRAY_SIZE, DECODES_ONLY
from jaxserve.bench.schedule import KernelSchedule, Loop, read_kernels
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.sharding.chips import Chip
from jaxserve.sharding.topology import Topology, run_deviceless

MATRIX_UNITS = 4
"""Of a core: what the published peaks come to at the clocks the chips have."""

MIB = 1 << 20


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
        compute_s: Of issue cycles, a lower bound.
        fetch_s: Of its keys and values at the memory's bandwidth.
        useful_fraction: Of peak, operations without padding.
        issued_fraction: Of peak, operations with padding.
        cycles: Of an iteration.
        dma_starts: Of an iteration.
        loop_spills: Spilled registers stored in an iteration.
        spilled_vectors: In all of the kernel.
        vmem_bytes: Highest byte in use.
        smem_bytes: Highest byte in use.
        temp_bytes: HBM that the program needs besides arguments and results.
    """

    kernel: str
    shape: str
    compile_s: float
    compute_s: float
    fetch_s: float
    useful_fraction: float
    issued_fraction: float
    cycles: int
    dma_starts: int
    loop_spills: int
    spilled_vectors: int
    vmem_bytes: int
    smem_bytes: int
    temp_bytes: int

    @property
    def compute_to_fetch(self) -> float:
        """Time to compute over time to fetch."""
        return self.compute_s / self.fetch_s

    def as_json(self) -> dict[str, object]:
        """All figures."""
        return {**asdict(self), "compute_to_fetch": self.compute_to_fetch}


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
    core = Core.of(topology.chip)
    what = f"Compiling for {topology}"
    cases = [
        (name, kernel) for name in shapes for kernel in kernels if shapes[name].is_decode or kernel not in DECODES_ONLY
    ]
    reports: list[StaticReport | Failure] = []
    progress(what, 0, len(cases))
    for name, kernel in cases:
        reports.append(_report(topology, core, kernel, name, shapes[name]))
        progress(what, len(reports), len(cases))
    return reports


def _report(topology: Topology, core: Core, kernel: str, name: str, shape: AttentionShape) -> StaticReport | Failure:
    with tempfile.TemporaryDirectory(prefix="jaxserve-schedule-") as folder:
        request = {"kernel": kernel, "shape": asdict(shape), "topology": str(topology)}
        variables = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        try:
            answer = run_deviceless(topology, "jaxserve.bench.kernel_worker", request, variables=variables)
            schedule = find_kernel(read_kernels(Path(folder)), answer["kernel"])
        except ConfigError:
            raise
        except (JaxserveError, ValueError) as error:
            return Failure(kernel=kernel, shape=name, reason=str(error))
    return summarise(kernel, name, schedule, answer, core)


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
    hot = schedule.hot_loop if answer["hot_trips"] == 1 else schedule.first_multiplying_loop
    if hot is None:
        raise ValueError(f"{schedule.name} has no loop that multiplies matrices")
    cycles = tile_cycles(schedule, hot, answer)
    seconds = cycles / core.cycles_per_s
    issued = hot.mxu_fraction(array_size=core.array_size, flops_per_cycle=core.flops_per_cycle)
    return StaticReport(
        kernel=kernel,
        shape=shape,
        compile_s=answer["compile_s"],
        compute_s=seconds,
        fetch_s=answer["tile_bytes"] / core.bytes_per_s,
        useful_fraction=answer["tile_flops"] / (cycles * core.flops_per_cycle),
        issued_fraction=issued * hot.own_cycles * answer["hot_trips"] / cycles,
        cycles=cycles,
        dma_starts=answer["tile_dmas"],
        loop_spills=hot.spill_stores,
        spilled_vectors=schedule.spilled_vectors,
        vmem_bytes=schedule.memory_bytes.get("vmem", 0),
        smem_bytes=schedule.memory_bytes.get("smem", 0),
        temp_bytes=answer["temp_bytes"],
    )


def tile_cycles(schedule: KernelSchedule, hot: Loop, answer: Mapping[str, Any]) -> int:
    """Cycles of an iteration of the KV loop.

    That is the hot loop itself, or the loop around it if a tile takes several iterations of the hot loop. Then the
    loops beside it count too, each as often as the kernel's tiles say: one that starts DMAs and one that awaits them,
    once a page, and one that stores vectors and multiplies nothing, which unpacks.

    Args:
        schedule: The kernel.
        hot: Its hot loop.
        answer: Of `kernel_worker`.
    """
    around = [loop for loop in schedule.loops if loop != hot and loop.start <= hot.start and hot.end <= loop.end]
    if answer["hot_trips"] == 1 or not around:
        return hot.steady_cycles(answer["tile_dmas"])
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
        + hot.own_cycles * int(answer["hot_trips"])
        + int(answer["tile_dmas"]) * (max(starts, default=0) + max(waits, default=0))
        + int(answer["unpack_trips"]) * min(unpacks, default=0)
    )


def table(topology: Topology, reports: Sequence[StaticReport | Failure]) -> Table:
    """A line a kernel and problem."""
    grid = Table(title=f"{topology}: an iteration of the KV loop, bfloat16", title_justify="left")
    grid.add_column("problem")
    grid.add_column("kernel")
    for name in ("compute us", "fetch us", "ratio", "useful", "issued", "spills", "VMEM MiB", "compile s"):
        grid.add_column(name, justify="right")
    last = None
    for report in reports:
        if last is not None and report.shape != last:
            grid.add_section()
        shown, last = "" if report.shape == last else report.shape, report.shape
        if isinstance(report, Failure):
            grid.add_row(shown, report.kernel, *["-"] * 8)
            continue
        grid.add_row(
            shown,
            report.kernel,
            f"{report.compute_s * 1e6:.2f}",
            f"{report.fetch_s * 1e6:.2f}",
            f"{report.compute_to_fetch:.2f}",
            f"{report.useful_fraction:.2f}",
            f"{report.issued_fraction:.2f}",
            f"{report.loop_spills}",
            f"{report.vmem_bytes / MIB:.1f}",
            f"{report.compile_s:.1f}",
        )
    return grid
