"""Compiles one attention kernel for a chip that is not here: `python -m`, in the environment of `run_deviceless`.

Reads the request (kernel, problem, topology) from standard input and answers on standard output; libtpu meanwhile
dumps the kernel's schedule where the environment says.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import jax

from jaxserve.bench.kernel_programs import lower
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import replicated
from jaxserve.sharding.topology import abstract_devices, answer, parse_topology


def compile_kernel(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what was asked for.

    Args:
        request: `kernel`, `shape` (fields of an AttentionShape), `topology`, `tiles` of ours or null.
    """
    topology = parse_topology(request["topology"])
    mesh = make_mesh(devices=abstract_devices(topology)[:1])
    # Pallas asks the current mesh for the TPU's generation.
    jax.set_mesh(mesh)
    shape = AttentionShape(**request["shape"])
    program = lower(request["kernel"], shape, topology.chip, replicated(mesh), request["tiles"])
    started, busy = time.monotonic(), time.process_time()
    compiled = program.lowered.compile()
    seconds, busy_seconds = time.monotonic() - started, time.process_time() - busy
    return {
        "kernel": program.kernel,
        "work": asdict(program.work),
        "compile_s": seconds,
        "compile_cpu_s": busy_seconds,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    answer(compile_kernel)
