"""Compiles every program before the engine is ready, and counts whatever is compiled after.

Programs are lowered and compiled on a few threads (XLA does not hold Python's lock), each once, with JAX's persistent
cache in between, so that a second start reads executables instead of making them. What comes out are `Compiled`
objects: called with any other shape they raise instead of compiling.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax import monitoring
from jax.sharding import Mesh

from jaxserve.engine.programs import Key, Program, Replica

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""What JAX reports each time it makes or loads an executable."""

_NEVER_S = 1e9
"""A compilation that would be worth keeping on a disk that cannot be written takes longer than any."""

logger = logging.getLogger(__name__)

Executables: TypeAlias = Mapping[Key, Any]
Progress: TypeAlias = Callable[[str, int, int], None]


def enable_persistent_cache(folder: Path) -> None:
    """Keeps executables on disk between runs of the process.

    Where nothing can be written, what is there is read and nothing is kept; a warning says so.
    """
    least_seconds = 0.0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        logger.warning(
            "compiled programs are not kept, for %s cannot be written: %s; every start compiles what is not there",
            *(folder, error.strerror),
        )
        if not folder.is_dir():
            return
        least_seconds = _NEVER_S
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def compiles_at_once(device_kind: str) -> int:
    """How many programs may be compiled for a kind of device at the same time in one process.

    libtpu 0.0.42 dies of a segmentation fault, two times in three, when two are compiled for a v7x; 0.0.50 does not.
    """
    return 1 if device_kind.startswith("TPU7") else 2


def compile_programs(
    programs: list[Program], *, num_threads: int, mesh: Mesh | None = None, progress: Progress | None = None
) -> Executables:
    """Compiles every program.

    Args:
        programs: What to compile.
        num_threads: How many are compiled at once.
        mesh: Devices that are not here, from which Pallas learns what it compiles for; None where they are.
        progress: Called with ("compile", done, total) after each; what it raises ends the compilation.

    Returns:
        The executable of each program's key.
    """
    executables: dict[Key, Any] = {}
    with ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as pool:
        futures = {pool.submit(_compile, program, mesh): program.key for program in programs}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                executables[futures[future]] = future.result()
                if progress is not None:
                    progress("compile", done, len(programs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return executables


def compile_holders(replica: Replica) -> Executables:
    """Compiles the programs that give loaded parameters the form that others take."""
    at_once = compiles_at_once(replica.mesh.devices.flat[0].device_kind)
    return compile_programs(list(replica.holders().values()), num_threads=at_once)


def _compile(program: Program, mesh: Mesh | None) -> Any:  # noqa: ANN401 - JAX does not export the type
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return program.lower().compile(compiler_options=dict(program.options) or None)


@dataclass
class CompileCounter:
    """Counts compilations of this process from `start` on; a ready engine must see none."""

    count: int = 0
    seconds: float = 0.0
    started_s: float = 0.0
    active: bool = False

    def start(self) -> None:
        """Begins to count."""
        self.started_s = time.monotonic()
        self.active = True
        monitoring.register_event_duration_secs_listener(self._listen)

    def stop(self) -> None:
        """Counts no longer."""
        if self.active:
            self.active = False
            monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs
