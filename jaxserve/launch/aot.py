"""Every program of a replica compiled for a slice that is not here, and what the compiler says of each.

`aot_report` starts processes that can compile for the topology (`sharding.topology.deviceless`) and deals the
programs out to them; this module is what runs there, too. The programs are the ones serving would compile, lowered from
the same abstract arguments. Processes and not threads, for libtpu 0.0.42 dies when two programs are compiled for a v7x
at once (`engine.compile.compiles_at_once`), and lowering holds Python's lock.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.config import ServeConfig, load
from jaxserve.core.resolution import ResolvedConfig
from jaxserve.engine.programs import Key, Program, Replica, programs
from jaxserve.launch.build import Progress, plan_replica, require_attention
from jaxserve.launch.bundle import serialized
from jaxserve.models.costs import device_bytes
from jaxserve.models.spec import ModelSpec
from jaxserve.sharding.collectives import Collective, collectives
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.topology import (
    Deviceless,
    Message,
    Topology,
    abstract_devices,
    answer,
    deviceless,
    parse_topology,
    reply,
)

NUM_PROCESSES = 2
"""How many compile at once; each takes one to two GiB of memory."""


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """What the compiler says of a program; bytes are of one device.

    Attributes:
        name: The program.
        bucket: Its size, 0 if it has one only.
        compile_s: Lowering and compiling.
        argument_bytes: What it is given.
        output_bytes: What it returns.
        aliased_bytes: The part of what it returns that stands where an argument stood.
        temporary_bytes: What it needs besides while it runs.
        code_bytes: The program itself, loaded.
        serialized_bytes: The program as a bundle stores it.
        collectives: What it exchanges with other devices.
        failure: Why it did not compile, or None.
    """

    name: str
    bucket: int
    compile_s: float
    argument_bytes: int = 0
    output_bytes: int = 0
    aliased_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    serialized_bytes: int = 0
    collectives: tuple[Collective, ...] = ()
    failure: str | None = None

    @property
    def key(self) -> Key:
        """Name and bucket."""
        return (self.name, self.bucket)


@dataclass(frozen=True, kw_only=True)
class AotReport:
    """A replica on a slice; bytes are of one device.

    Attributes:
        model: The model as it was named.
        topology: The slice.
        mesh: Sizes of the mesh axes.
        dtype: Of activations and unquantised weights.
        kv_dtype: Of the KV pool.
        page_size: Tokens a page holds.
        num_pages: Pages of each layer.
        max_model_len: Most tokens of a sequence.
        token_buckets: Sizes of the decoder's steps.
        seq_buckets: Sizes of the head's steps.
        weight_bytes: Parameters.
        kv_bytes: The KV pool.
        state_bytes: The sampler's state.
        programs: One report each, of those that were compiled.
    """

    model: str
    topology: str
    mesh: Mapping[str, int]
    dtype: str
    kv_dtype: str
    page_size: int
    num_pages: int
    max_model_len: int
    token_buckets: tuple[int, ...]
    seq_buckets: tuple[int, ...]
    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    programs: tuple[ProgramReport, ...] = ()

    @property
    def temporary_bytes(self) -> int:
        """What the hungriest program needs while it runs; one runs at a time."""
        return max((report.temporary_bytes for report in self.programs), default=0)

    @property
    def code_bytes(self) -> int:
        """All programs that were compiled; each stays loaded."""
        return sum(report.code_bytes for report in self.programs)

    @property
    def serialized_bytes(self) -> int:
        """All programs that were compiled, as a bundle stores them."""
        return sum(report.serialized_bytes for report in self.programs)

    @property
    def total_bytes(self) -> int:
        """Memory a device needs."""
        return self.weight_bytes + self.kv_bytes + self.state_bytes + self.temporary_bytes + self.code_bytes

    @property
    def failures(self) -> tuple[ProgramReport, ...]:
        """Programs that did not compile."""
        return tuple(report for report in self.programs if report.failure is not None)

    def as_json(self) -> Message:
        """As a JSON object."""
        return {
            **asdict(self),
            "temporary_bytes": self.temporary_bytes,
            "code_bytes": self.code_bytes,
            "serialized_bytes": self.serialized_bytes,
        }

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> AotReport:
        """Undoes `as_json`."""
        values = {setting.name: message[setting.name] for setting in fields(cls)}
        for name in ("token_buckets", "seq_buckets"):
            values[name] = tuple(values[name])
        values["programs"] = tuple(
            ProgramReport(**{**report, "collectives": tuple(Collective(**each) for each in report["collectives"])})
            for report in values["programs"]
        )
        return cls(**values)


def config_for(model: str, settings: Mapping[str, str], topology: Topology) -> ServeConfig:
    """The configuration that serves a model on a slice: all its devices in the tensor axis unless a mesh is given.

    Args:
        model: What serve takes.
        settings: Flags of serve as text, by setting name.
        topology: The slice.

    Raises:
        ConfigError: A setting is unknown or wrong, or not for such a slice.
    """
    mesh = {"mesh": f"tensor={topology.num_devices}"}
    config = load({**mesh, **settings, "model": model}, environ={})
    require_attention(config, topology.chip.platform)
    return config


def aot_report(
    model: str,
    topology: Topology,
    *,
    settings: Mapping[str, str] | None = None,
    wanted: tuple[Key, ...] | None = None,
    largest_only: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> AotReport:
    """Compiles a model's programs for a slice.

    Args:
        model: A preset, a folder, a .gguf file or a hub id; its weights are not read.
        topology: The slice.
        settings: Flags of serve as text, by setting name.
        wanted: Programs to compile; all if None.
        largest_only: Of each program only its largest size, and the decoder also at the size of a full decode step.
        offline: Fetch nothing.
        progress: Told how many are done.

    Raises:
        ConfigError: The slice cannot be compiled for, or the settings cannot be served.
        DevicelessError: The compiling process died.
    """
    request = {
        "model": model,
        "topology": str(topology),
        "settings": dict(settings or {}),
        "wanted": None if wanted is None else [list(key) for key in wanted],
        "largest_only": largest_only,
        "offline": offline,
    }
    parts = NUM_PROCESSES if wanted is None else min(NUM_PROCESSES, max(1, len(wanted)))
    done = count()  # whose next() no other thread comes between

    def told(message: Message) -> None:
        if progress is not None:
            progress(f"compile for {topology}", next(done), message["total"])

    def compile_part(part: int, process: Deviceless) -> AotReport:
        return AotReport.from_json(process.ask({**request, "part": part, "parts": parts}, told))

    told({"total": 1})
    # The processes end before the threads that wait for them, or an interrupt would wait, too.
    with ThreadPoolExecutor(parts) as pool, ExitStack() as stack:
        processes = [stack.enter_context(deviceless(topology, "jaxserve.launch.aot")) for _ in range(parts)]
        first, *others = pool.map(compile_part, range(parts), processes)
    dealt = zip_longest(first.programs, *(report.programs for report in others))
    return replace(first, programs=tuple(each for each in chain.from_iterable(dealt) if each is not None))


def describe(model: str, topology: Topology, replica: Replica) -> AotReport:
    """The report of a replica before anything is compiled."""
    layout = replica.layout
    limits = replica.limits
    return AotReport(
        model=model,
        topology=str(topology),
        mesh=dict(replica.mesh.shape),
        dtype=replica.blueprint.dtype.name,
        kv_dtype=layout.dtype.name,
        page_size=layout.page_size,
        num_pages=layout.num_pages,
        max_model_len=limits.max_model_len,
        token_buckets=replica.buckets.tokens,
        seq_buckets=replica.buckets.seqs,
        weight_bytes=device_bytes(replica.abstract_params()),
        kv_bytes=layout.device_bytes(replica.mesh),
        state_bytes=device_bytes(replica.abstract_sampling()),
    )


def compile_report(program: Program, mesh: Mesh) -> ProgramReport:
    """Compiles a program and reads what the compiler says; a failure is reported, not raised."""
    name, bucket = program.key
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # The compiler's dump, for `as_text` takes the executable apart again, and fails where libtpu has moved work to
        # a SparseCore.
        options: dict[str, bool | str] = {**program.options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            # Pallas learns the chip's generation from the mesh of the thread.
            with jax.set_mesh(mesh):
                compiled = program.lower().compile(compiler_options=options)
        except Exception as error:  # the compiler's errors are of many types; each is a finding
            said = str(error).strip() or type(error).__name__
            return ProgramReport(
                name=name, bucket=bucket, compile_s=time.monotonic() - started, failure=said.splitlines()[0]
            )
        text = optimised_hlo(Path(folder))
    memory = compiled.memory_analysis()
    assert memory is not None
    return ProgramReport(
        name=name,
        bucket=bucket,
        compile_s=time.monotonic() - started,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        serialized_bytes=len(serialized(compiled)),
        collectives=collectives(text),
    )


def optimised_hlo(folder: Path) -> str:
    """The optimised HLO of the one program whose compilation was dumped to a folder.

    libtpu names the file `module_0000.jit_f.cl_1.after_optimizations.txt`, the CUDA compiler
    `module_0001.jit_f.sm_9.0a_gpu_after_optimizations.txt`.
    """
    [path] = folder.glob("*.jit_*after_optimizations.txt")
    return path.read_text()


def abstract_replica(spec: ModelSpec, config: ServeConfig, topology: Topology) -> tuple[Replica, ResolvedConfig]:
    """A replica on a slice that is not here; in a process with the topology's environment."""
    shape = config.mesh
    mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor, devices=abstract_devices(topology))
    return plan_replica(config, spec, mesh, device_memory_bytes=topology.chip.serving_bytes)


def largest_keys(replica: Replica) -> list[list[object]]:
    """Each program's largest size, and the decoder's for one token of every sequence."""
    tokens, seqs = replica.buckets.tokens[-1], replica.buckets.seqs[-1]
    decodes = {replica.buckets.tokens_for(seqs), tokens}
    return [*(["decode", size] for size in decodes), ["head", seqs], ["score", tokens], ["admit", 0], ["copy_pages", 0]]


def _respond(request: Message) -> Message:
    topology = parse_topology(request["topology"])
    config = config_for(request["model"], request["settings"], topology)
    spec = spec_of(request["model"], offline=request["offline"], passed_over=config.ignore_config_keys)
    replica, _ = abstract_replica(spec, config, topology)
    wanted = largest_keys(replica) if request["largest_only"] else request["wanted"]
    chosen = [each for each in programs(replica) if wanted is None or list(each.key) in wanted]
    reports = []
    for program in chosen[request["part"] :: request["parts"]]:
        reports.append(asdict(compile_report(program, replica.mesh)))
        reply({"total": len(chosen)})
    return {**describe(request["model"], topology, replica).as_json(), "programs": reports}


if __name__ == "__main__":
    answer(_respond)
