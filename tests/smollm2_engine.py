"""The demo model in this process, in as few programs as a test needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from jaxserve.core.config import ServeConfig
from jaxserve.engine.loop import LocalEngine
from jaxserve.launch.build import Model, build_engine, find_model


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
