"""Compiles the page copies for a chip that is not here, and says what memory they take."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas.dispatch import Backend, Target
from jaxserve.pallas.page_copy.api import copy_pages, gather_pages, scatter_pages
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import replicated
from jaxserve.sharding.topology import abstract_devices, answer, parse_topology

LAYERS, PAGES, SLOTS = 4, 500, 8


def compile_copies(request: dict[str, Any]) -> dict[str, Any]:
    topology = parse_topology(request["topology"])
    mesh = make_mesh(devices=abstract_devices(topology)[:1])
    jax.set_mesh(mesh)
    platform = topology.chip.platform
    target = Target(platform=platform, backend=Backend(platform))

    def struct(*shape: int, dtype: str = request["dtype"]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=replicated(mesh))

    page = tuple(request["page"])
    pool, buffer, ids = struct(LAYERS * PAGES, *page), struct(SLOTS, LAYERS, *page), struct(SLOTS, dtype="int32")
    calls: dict[str, tuple[Any, tuple[Any, ...], int]] = {
        "copy": (partial(copy_pages, num_layers=LAYERS), (pool, ids, ids), 0),
        "gather": (gather_pages, (pool, ids, buffer), 2),
        "scatter": (scatter_pages, (buffer, ids, pool), 2),
    }
    found = {}
    for name, (function, args, donated) in calls.items():
        compiled = jax.jit(partial(function, target=target), donate_argnums=donated).lower(*args).compile()
        memory = compiled.memory_analysis()
        written = args[donated]
        found[name] = {
            "aliased": memory.alias_size_in_bytes >= written.size * written.dtype.itemsize,
            "temp_bytes": memory.temp_size_in_bytes,
        }
    return found


if __name__ == "__main__":
    answer(compile_copies)
