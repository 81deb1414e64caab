"""Whether requests give the same tokens however they are run: how they are run, and how results are compared."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

import pytest
from tiny_engine import Compiled, generate_all, serving, start, tokens_by_index

from jaxserve.core.types import Request, TokenEvent
from jaxserve.engine.api import EngineStats

Results: TypeAlias = list[list[TokenEvent]]


def run(
    model: Compiled, requests: Sequence[Request], *, concurrently: bool = True, rounds: int = 1, **limits: Any
) -> tuple[Results, EngineStats]:
    """Events of the requests (in the last of several rounds on one engine), and what the engine counted."""

    async def generate() -> tuple[Results, EngineStats]:
        async with serving(start(model, **limits)) as engine:
            for _ in range(rounds):
                results = await generate_all(engine, requests, concurrently=concurrently)
            return results, engine.stats()

    return asyncio.run(generate())


def assert_same(requests: Sequence[Request], results: Results, expected: Results) -> None:
    """Tokens and ends are identical, and log-probabilities nearly so."""
    for request, given, wanted in zip(requests, results, expected, strict=True):
        assert tokens_by_index(given) == tokens_by_index(wanted), request
        for index in range(request.n):
            mine, theirs = ([e for e in events if e.index == index] for events in (given, wanted))
            assert [e.finish_reason for e in mine] == [e.finish_reason for e in theirs]
            assert values_of(mine) == pytest.approx(values_of(theirs), abs=2e-4)


def values_of(events: Sequence[TokenEvent]) -> list[float]:
    """All log-probabilities that the events report."""
    entries = [entry for event in events for entry in (*(event.prompt_logprobs or ()), *(event.logprobs or ()))]
    return [value for entry in entries if entry for value in (entry.logprob, *(value for _, value in entry.top))]
