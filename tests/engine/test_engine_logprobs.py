"""Log-probabilities of prompts: arrays until somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from jaxserve.core.types import TokenLogprobs
from jaxserve.engine.logprobs import LogprobTable, PromptLogprobs


def table(first: int, count: int) -> LogprobTable:
    rows = np.arange(first, first + count, dtype=np.int32)
    tops = rows[:, None] + np.arange(20, dtype=np.int32)
    return LogprobTable(
        token_ids=rows,
        logprob=-rows.astype(np.float32) / 4,
        rank=rows + 1,
        top_ids=tops,
        top_logprobs=-tops.astype(np.float32),
    )


def entry(row: int, num_top: int) -> TokenLogprobs:
    top = tuple((row + i, -float(row + i)) for i in range(num_top))
    return TokenLogprobs(token_id=row, logprob=-row / 4, rank=row + 1, top=top)


def collected(*counts: int) -> tuple[PromptLogprobs, tuple[TokenLogprobs | None, ...]]:
    found, expected, first = PromptLogprobs(), [None], 0
    for count in counts:
        found.add(table(first, count + 2).copy_of(1, 1 + count, 3))
        expected += [entry(first + 1 + i, 3) for i in range(count)]
        first += 7
    return found, tuple(expected)


@pytest.mark.parametrize("counts", [(), (1,), (4,), (2, 5), (3, 1, 3)])
def test_reads_as_the_entries(counts: tuple[int, ...]) -> None:
    found, expected = collected(*counts)
    assert isinstance(found, Sequence)
    assert len(found) == len(expected)
    assert tuple(found) == expected
    assert found == expected
    assert found != (*expected, None)
    assert found != expected[:-1]
    assert found == collected(*counts)[0]
    for i in range(-len(expected), len(expected)):
        assert found[i] == expected[i]
    for bounds in [(None, None), (0, 2), (1, 3), (2, 100), (5, 5), (-2, None), (None, None, 2), (None, None, -1)]:
        assert found[slice(*bounds)] == expected[slice(*bounds)]
    for i in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            found[i]


def test_plain_values() -> None:
    [_, first] = collected(1)[0]
    assert first is not None
    assert [type(value) for value in (first.token_id, first.logprob, first.rank, *first.top[0])] == [
        int,
        float,
        int,
        int,
        float,
    ]


def test_keeps_no_step_alive() -> None:
    """A step's table has room for every token of the step and 20 alternatives each."""
    copy = table(0, 512).copy_of(3, 5, 0)
    assert all(getattr(copy, name).base is None for name in ("token_ids", "logprob", "rank", "top_ids", "top_logprobs"))


def test_nothing_is_made_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are committed under the scheduler's lock."""
    monkeypatch.setattr(LogprobTable, "rows", None)
    collected_ = PromptLogprobs()
    collected_.add(table(0, 512).copy_of(0, 512, 20))
    assert len(collected_) == 513
