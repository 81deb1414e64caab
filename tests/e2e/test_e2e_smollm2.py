"""The demo model through the real engine in float32: the tokens of `transformers`, however they are scheduled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invariance import Results, assert_same, run
from smollm2_engine import compiled_smollm2
from tiny_engine import Compiled, on_mesh, tokens_by_index

from jaxserve.core.config import ServeConfig
from jaxserve.core.types import MAX_LOGPROBS, Request, SamplingParams, TokenEvent, TokenLogprobs
from jaxserve.launch.build import Model, find_model
from jaxserve.sharding.rules import kv_repeat

GOLDENS = Path(__file__).parents[1] / "goldens" / "smollm2.npz"
TOLERANCE = 2e-4
PAGE_SIZE = 8
CONFIG = ServeConfig(
    model="smollm2-135m",
    dtype="float32",
    page_size=PAGE_SIZE,
    num_pages=256,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=192,
)
SENTENCES = (
    "The Moon goes around the Earth in about 27 days, and it always shows us the same side.",
    "<|im_start|>user\nWrite a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "Once upon a time there was a small village between two mountains, and in it lived a",
    "Ingredients for six pancakes: 250 g of flour, two eggs, half a litre of milk,",
    "<|im_start|>user\nWhy is the sky blue? 😀 Explain it to a child.<|im_end|>\n<|im_start|>assistant\n",
    "In 1905, Albert Einstein published four papers. The first of them explained",
    "Dear Sir or Madam,\n\nI am writing to you because the bicycle that I bought last week",
    "1 2 4 8 16 32 64",
    "Bonjour, je m'appelle",
)
PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    {"temperature": 0.0, "min_tokens": 8, "ignore_eos": False},
    {"temperature": 0.0, "n": 2},
    {"temperature": 0.0, "bad_words": ((198,), (28, 284))},
    {"temperature": 1.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.05, "logprobs": 3},
    {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": -0.4},
    {"temperature": 0.8, "logit_bias": {338: 4.0, 29: 2.5, 30: -100.0}},
    {"temperature": 1.5, "top_k": 5, "prompt_logprobs": 1},
    {"temperature": 1.0, "ignore_eos": False, "stop_token_ids": (30, 29, 28)},
    {"temperature": 1.0, "frequency_penalty": 1.5, "n": 2},
    {"temperature": 0.6, "top_p": 0.95, "logprobs": 1},
)


@pytest.fixture(scope="module")
def model() -> Model:
    return find_model(CONFIG)


@pytest.fixture(scope="module")
def one_device(model: Model) -> Compiled:
    return compiled_smollm2(CONFIG, model)


@pytest.fixture(scope="module")
def requests(model: Model) -> list[Request]:
    """Twenty; each prompt stands twice, the second time with more behind it."""
    made = []
    for number, given in enumerate(PARAMETERS):
        text = SENTENCES[number // 2] + (" And so" if number % 2 else "")
        fields = {"seed": 100 + number, "max_tokens": 12, "ignore_eos": True, **given}
        n = fields.pop("n", 1)
        prompt = tuple(model.tokenizer.encode(text, add_special_tokens=False))
        made.append(Request(request_id=f"r{number}", prompt=prompt, n=n, sampling=SamplingParams(**fields)))
    return made


@pytest.fixture(scope="module")
def alone(one_device: Compiled, requests: list[Request]) -> Results:
    """Each request by itself, nothing cached, on one device."""
    results, stats = run(one_device, requests, concurrently=False, enable_prefix_caching=False)
    assert (stats.num_preemptions, stats.prefix_cache_hits_tokens) == (0, 0)
    return results


def entries_of(events: list[TokenEvent]) -> list[TokenLogprobs]:
    """What was reported of the tokens after each position of the prompt, and of each output token."""
    entries = [entry for event in events for entry in (*(event.prompt_logprobs or ()), *(event.logprobs or ()))]
    assert entries[0] is None
    return [entry for entry in entries if entry is not None]


def test_greedy_tokens_and_logprobs_are_those_of_transformers(one_device: Compiled) -> None:
    golden = np.load(GOLDENS)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=MAX_LOGPROBS, prompt_logprobs=MAX_LOGPROBS
    )
    prompts = [tuple(golden[f"prompt_{index}"].tolist()) for index in range(10)]
    asked = [Request(request_id=str(index), prompt=prompt, sampling=sampling) for index, prompt in enumerate(prompts)]
    results, _ = run(one_device, asked)
    for index, events in enumerate(results):
        assert tokens_by_index(events) == {0: golden[f"greedy_{index}"].tolist()}
        entries = entries_of(events)
        text = [*prompts[index], *golden[f"greedy_{index}"].tolist()]
        assert [entry.token_id for entry in entries] == text[1:]
        # The golden goes one position further: what would come after the last token.
        ids, values = golden[f"top_ids_{index}"][:-1], golden[f"top_logprobs_{index}"][:-1]
        assert np.max(np.abs(np.array([[value for _, value in entry.top] for entry in entries]) - values)) <= TOLERANCE
        for entry, golden_ids, golden_values in zip(entries, ids.tolist(), values.tolist(), strict=True):
            expected = dict(zip(golden_ids, golden_values, strict=True))
            # Tokens of a near-tie may change places, and the last with the first that is not reported.
            assert {token for token, value in expected.items() if value > golden_values[-1] + TOLERANCE} <= {
                token for token, _ in entry.top
            }
            assert all(abs(value - expected.get(token, golden_values[-1])) <= TOLERANCE for token, value in entry.top)


def test_requests_are_of_every_kind(alone: Results) -> None:
    assert len(alone) == 20
    reasons = {event.finish_reason for events in alone for event in events if event.finish_reason}
    assert sorted(reasons) == ["length", "stop"]
    # Only the two greedy sequences of one request are alike.
    every = [tuple(tokens) for events in alone for tokens in tokens_by_index(events).values()]
    assert len(set(every)) == len(every) - 1


def test_batched(one_device: Compiled, requests: list[Request], alone: Results) -> None:
    results, stats = run(one_device, requests, enable_prefix_caching=False)
    assert_same(requests, results, alone)
    assert stats.num_steps < sum(len(events) for events in alone) / 3


def test_chunked(one_device: Compiled, requests: list[Request], alone: Results) -> None:
    results, stats = run(one_device, requests, max_num_batched_tokens=8, enable_prefix_caching=False)
    assert_same(requests, results, alone)
    assert stats.num_steps > sum(len(request.prompt) for request in requests) / 8


def test_preempted(one_device: Compiled, requests: list[Request], alone: Results) -> None:
    results, stats = run(one_device, requests, num_pages=16, enable_prefix_caching=False)
    assert_same(requests, results, alone)
    assert stats.num_preemptions > 5


def test_prefix_cached(one_device: Compiled, requests: list[Request], alone: Results) -> None:
    results, stats = run(one_device, requests, rounds=2)
    assert_same(requests, results, alone)
    for request, events in zip(requests, results, strict=True):
        whole_pages = (len(request.prompt) - 1) // PAGE_SIZE * PAGE_SIZE
        scored = request.sampling.prompt_logprobs is not None
        assert events[0].num_cached_tokens == (0 if scored else whole_pages)
    assert stats.prefix_cache_hits_tokens > 0


@pytest.mark.parametrize(
    ("tensor", "split", "every"),
    [pytest.param(2, 1, 1, id="heads do not divide"), pytest.param(3, 3, 5, id="heads divide", marks=pytest.mark.slow)],
)
def test_on_a_mesh(model: Model, requests: list[Request], alone: Results, tensor: int, split: int, every: int) -> None:
    compiled = compiled_smollm2(on_mesh(CONFIG, tensor=tensor), model)
    mesh, layout = compiled.replica.mesh, compiled.replica.layout
    assert mesh.size == tensor
    assert kv_repeat(model.spec.num_heads, model.spec.num_kv_heads, mesh) == 1
    assert layout.sharding(mesh).shard_shape(layout.shape)[2] == 2 * layout.num_kv_heads // split
    results, _ = run(compiled, requests[::every])
    assert_same(requests[::every], results, alone[::every])
