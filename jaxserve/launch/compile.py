"""A model's programs compiled into a bundle: for this machine's CPUs, or for a slice that is not here.

For a slice the work is done by a process that can compile for it (`sharding.topology.run_deviceless`); this module is
what runs there, too. No weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.config import load
from jaxserve.core.errors import ConfigError
from jaxserve.core.resolution import ResolvedConfig
from jaxserve.engine.compile import compile_programs, compiles_at_once
from jaxserve.engine.programs import programs
from jaxserve.launch.aot import abstract_replica, config_for
from jaxserve.launch.build import Progress, plan_replica
from jaxserve.launch.bundle import read_key, require_place, write_bundle
from jaxserve.launch.loading import attention_as_asked
from jaxserve.launch.origin import Origin, cpu_features
from jaxserve.pallas.dispatch import Backend
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.topology import Message, answer, parse_topology, reply, run_deviceless

CPU = "cpu"
"""The topology that stands for this machine's processors."""

_CACHE = "jax_enable_compilation_cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What was compiled.

    Attributes:
        topology: For what.
        num_programs: How many programs.
        num_bytes: Size of their executables.
        settings: Settings of serve that the bundle stands for.
    """

    topology: str
    num_programs: int
    num_bytes: int
    settings: Mapping[str, str]


def compile_bundle(
    model: str,
    topology: str,
    out: Path,
    *,
    settings: Mapping[str, str],
    key: Path | None = None,
    progress: Progress | None = None,
) -> Written:
    """Compiles a model's programs and writes them as a bundle.

    Args:
        model: What serve takes; its weights are not read.
        topology: "cpu", or a slice such as "v6e:2x4".
        out: The bundle's folder.
        settings: Flags of serve as text, by setting name.
        key: A file whose content signs the manifest.
        progress: Told how many programs are done.

    Raises:
        ConfigError: The settings cannot be served, the slice cannot be compiled for, or the folder is taken.
        DevicelessError: The compiling process died.
    """
    require_place(out)
    if topology == CPU:
        return _compile(model, topology, out, settings, key, progress)
    request = {
        "model": model,
        "topology": topology,
        "out": str(out),
        "settings": dict(settings),
        "key": None if key is None else str(key),
    }

    def told(message: Message) -> None:
        if progress is not None and "done" in message:
            progress(f"compile for {topology}", message["done"], message["total"])

    told({"done": 0, "total": 1})
    said = run_deviceless(parse_topology(topology), "jaxserve.launch.compile", request, on_message=told)
    return Written(**said)


def shape_settings(resolved: ResolvedConfig) -> dict[str, str]:
    """The settings of serve that give the same programs again, as text."""
    asked = resolved.asked
    share = None if asked.memory_fraction is None else str(asked.memory_fraction)
    chosen = {"quantization": asked.quantization, "attention": asked.attention, "memory_fraction": share}
    return {
        "mesh": str(asked.mesh),
        "dtype": resolved.dtype,
        "kv_cache_dtype": resolved.kv_cache_dtype,
        "max_model_len": str(resolved.max_model_len),
        "max_num_seqs": str(resolved.max_num_seqs),
        "max_num_batched_tokens": str(resolved.max_num_batched_tokens),
        "page_size": str(resolved.page_size),
        "num_pages": str(resolved.num_pages),
        **{name: value for name, value in chosen.items() if value is not None},
    }


def processors() -> list[jax.Device]:
    """This machine's processors as JAX's devices, also where it has a GPU or a TPU.

    Raises:
        ConfigError: JAX has been told to leave them out.
    """
    try:
        return jax.devices(CPU)
    except RuntimeError as error:
        raise ConfigError(
            f"JAX may not use the processors here ({error}); unset JAX_PLATFORMS, or let it name cpu, too.",
            param="topology",
        ) from error


@contextmanager
def _without_cache() -> Iterator[None]:
    """Everything is compiled, for a while, in every thread, though JAX may keep executables on disk.

    What comes from there runs, but on CPUs it is serialised without its code.
    """
    before: bool = jax.config.values[_CACHE]
    jax.config.update(_CACHE, False)
    reset_cache()  # JAX looks only once, before it first compiles, whether there is a cache
    try:
        yield
    finally:
        jax.config.update(_CACHE, before)
        reset_cache()


def _compile(
    model: str, topology: str, out: Path, settings: Mapping[str, str], key: Path | None, progress: Progress | None
) -> Written:
    signing = read_key(key)
    config = load({**settings, "model": model}, environ={})
    spec = spec_of(model, passed_over=config.ignore_config_keys)
    if topology == CPU:
        if config.attention == Backend.TPU:
            raise ConfigError(
                "--attention tpu is interpreted on CPUs, step by step, and leaves no executable to store; leave it "
                "out, or compile for a slice with --topology.",
                param="attention",
            )
        shape, elsewhere = config.mesh, None
        mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor, devices=processors())
        replica, resolved = plan_replica(config, spec, mesh)
    else:
        slice_ = parse_topology(topology)
        config = config_for(model, settings, slice_)
        replica, resolved = abstract_replica(spec, config, slice_)
        elsewhere = replica.mesh
    at_once = compiles_at_once(replica.mesh.devices.flat[0].device_kind)
    with _without_cache(), attention_as_asked(config):
        compiled = compile_programs(programs(replica), num_threads=at_once, mesh=elsewhere, progress=progress)
    shaping = shape_settings(resolved)
    num_bytes = write_bundle(
        out,
        compiled,
        topology=topology,
        origin=Origin.of(replica, config),
        settings=shaping,
        features=cpu_features(replica),
        key=signing,
    )
    return Written(topology=topology, num_programs=len(compiled), num_bytes=num_bytes, settings=shaping)


def _respond(request: Message) -> Message:
    def told(what: str, done: int, total: int) -> None:
        reply({"done": done, "total": total})

    key = None if request["key"] is None else Path(request["key"])
    written = _compile(
        request["model"], request["topology"], Path(request["out"]), request["settings"], key, progress=told
    )
    return asdict(written)


if __name__ == "__main__":
    answer(_respond)
