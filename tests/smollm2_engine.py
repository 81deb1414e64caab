"""The demo model in this process, in as few programs as a test needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tiny_engine import Compiled

from jaxserve.checkpoint.sources import load_params
from jaxserve.core.config import ServeConfig
from jaxserve.engine.compile import compile_programs
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.programs import programs
from jaxserve.launch.build import Model, build_engine, find_model, plan_replica
from jaxserve.sharding.mesh import make_mesh


@asynccontextmanager
async def smollm2(**settings: Any) -> AsyncIterator[tuple[LocalEngine, Model]]:
    """An engine that is ready, and what it serves; closed at the end."""
    given: dict[str, Any] = {"max_model_len": 1024, "num_pages": 128, "compilation_cache": False, **settings}
    config = ServeConfig(model="smollm2-135m", **given)
    model = find_model(config)
    engine = build_engine(config, model)
    try:
        yield engine, model
    finally:
        await engine.close()


def compiled_smollm2(config: ServeConfig, model: Model) -> Compiled:
    """Programs and parameters, to be served in many ways by `tiny_engine.start`."""
    shape = config.mesh
    mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor)
    replica, resolved = plan_replica(config, model.spec, mesh)
    return Compiled(
        replica=replica,
        resolved=resolved,
        params=load_params(model.source, model.spec, replica.blueprint.params(), mesh=mesh),
        executables=compile_programs(programs(replica), num_threads=2),
    )
