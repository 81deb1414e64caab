"""Ten thousand requests: each is answered, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator

import pytest
from server_harness import CHAT, COMPLETIONS, chat, client_of, completion, make_app, make_engine, until_idle

BODIES = [
    (CHAT, chat(max_tokens=2)),
    (CHAT, chat(max_tokens=2, stream=True)),
    (COMPLETIONS, completion(["A", "B"], max_tokens=2, stop="B")),
    (COMPLETIONS, completion("A", max_tokens=2, n=2, logprobs=1, stream=True)),
    (CHAT, chat(n=0)),
]


@pytest.fixture
def unlogged() -> Iterator[None]:
    """pytest keeps every log record of a test, which would look like a leak."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("unlogged")
async def test_10000_requests_leave_nothing_behind() -> None:
    engine = make_engine()
    async with client_of(make_app(engine)) as client:

        async def visit(num_requests: int) -> list[int]:
            statuses = []
            for i in range(num_requests):
                route, body = BODIES[i % len(BODIES)]
                response = await client.post(route, json=body)
                statuses.append(response.status_code)
                assert response.status_code != 200 or not body.get("stream") or response.text.endswith("[DONE]\n\n")
            return statuses

        async def visit_together(num_requests: int) -> int:
            statuses = await asyncio.gather(*(visit(num_requests // 50) for _ in range(50)))
            assert all(status in (200, 400) for visitor in statuses for status in visitor)
            await until_idle(engine)
            gc.collect()
            return len(gc.get_objects())

        before = await visit_together(1000)
        after = await visit_together(9000)
    # A leak of one object a request would show as 9000.
    assert after - before < 1000
    assert len(asyncio.all_tasks()) <= 2
