"""Fixtures of the server tests: a fake engine, the app in front of it, a client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from server_harness import client_of, make_app, make_engine

from jaxserve.engine.fake import FakeEngine


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = make_engine()
    yield engine
    await engine.close()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(engine)) as client:
        yield client
