"""What a serving benchmark sends: lengths, prefixes, seeds, arrival times."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from jaxserve.bench.workload import Shape, make_items, poisson_times

IDS = list(range(1000, 1200))


def shape(**fields: float) -> Shape:
    return Shape(**{"num_requests": 20, "input_tokens": 32, "output_tokens": 8, **fields})  # type: ignore[arg-type]  # counts


def test_prompts_of_ids_have_the_length_asked_for() -> None:
    items = make_items(shape(), seed=0, token_ids=IDS)
    assert [len(item.prompt) for item in items] == [32] * 20
    assert all(set(item.prompt) <= set(IDS) for item in items)
    assert {item.output_tokens for item in items} == {8}


def test_prompts_of_words() -> None:
    for item in make_items(shape(), seed=0, token_ids=None):
        assert isinstance(item.prompt, str)
        assert len(item.prompt.split(" ")) == 32


@pytest.mark.parametrize("token_ids", [IDS, None])
def test_the_seed_decides(token_ids: list[int] | None) -> None:
    assert make_items(shape(), seed=1, token_ids=token_ids) == make_items(shape(), seed=1, token_ids=token_ids)
    first, second = (make_items(shape(), seed=seed, token_ids=token_ids) for seed in (1, 2))
    assert not {item.prompt for item in first} & {item.prompt for item in second}


def test_shared_prefixes_take_turns() -> None:
    items = make_items(shape(prefix_tokens=24, num_prefixes=2), seed=0, token_ids=IDS)
    prefixes = [item.prompt[:24] for item in items]
    assert prefixes[0::2] == [prefixes[0]] * 10
    assert prefixes[1::2] == [prefixes[1]] * 10
    assert prefixes[0] != prefixes[1]
    assert len({item.prompt[24:] for item in items}) == 20
    assert {len(item.prompt) for item in items} == {32}


def test_lengths_spread_evenly_around_the_mean() -> None:
    items = make_items(shape(num_requests=500, length_spread=0.5), seed=0, token_ids=IDS)
    lengths = [len(item.prompt) for item in items]
    assert (min(lengths), max(lengths)) == (16, 48)
    assert statistics.mean(lengths) == pytest.approx(32, abs=2)
    assert {item.output_tokens for item in items} == set(range(4, 13))


def test_poisson_arrivals() -> None:
    times = poisson_times(4000, rate=10, seed=0)
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.1)
    assert times == poisson_times(4000, rate=10, seed=0)
    assert times != poisson_times(4000, rate=10, seed=1)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert poisson_times(3, rate=float("inf"), seed=0) == [0, 0, 0]
