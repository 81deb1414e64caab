"""A step that fails while the next one is on the device already: the loop over a device that checks every page."""

from __future__ import annotations

import asyncio
import logging

import pytest
from page_engine import PageRunner, alone, new_engine, requests
from tiny_engine import generate_all, serving, tokens_by_index

from jaxserve.core.types import FinishReason


@pytest.mark.parametrize("num_pages", [64, 12])
@pytest.mark.parametrize("failing", range(8))
async def test_step_fails_while_the_next_is_dispatched(
    failing: int, num_pages: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    runner = PageRunner((failing,))
    async with serving(new_engine(runner, num_pages=num_pages)) as engine:
        results = await asyncio.wait_for(generate_all(engine, requests()), 30)
        assert engine.health().ready
    # The next step was dispatched before the failure was known, and nobody asked what it had computed.
    moment = runner.log.index(("result", failing))
    assert runner.log[moment - 1 : moment + 2] == [("dispatch", failing + 1), ("result", failing), ("reset", 0)]
    assert ("result", failing + 1) not in runner.log
    hit, num_failed = runner.members[failing], 0
    for request, events in zip(requests(), results, strict=True):
        tokens = tokens_by_index(events)
        for index in range(request.n):
            ends = [e for e in events if e.index == index and e.finish_reason is not None]
            assert len(ends) == 1
            assert [e for e in events if e.index == index][-1] is ends[0]
            expected, got = alone(request, index), tokens[index]
            if ends[0].finish_reason is FinishReason.ERROR:
                num_failed += 1
                assert request.request_id in hit
                assert got == expected[: len(got)]
            else:
                assert ends[0].finish_reason is FinishReason.LENGTH
                assert got == expected
    assert len(hit) <= num_failed < sum(request.n for request in requests())
