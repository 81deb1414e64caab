"""What int8 costs in quality: perplexity of the demo model on a text, measured through the engine."""

from __future__ import annotations

import math
from pathlib import Path

from smollm2_engine import smollm2

from jaxserve.core.types import Request, SamplingParams

TEXT = (Path(__file__).parents[1] / "data" / "perplexity.txt").read_text(encoding="utf-8")


async def mean_loss(dtype: str, quantization: str | None) -> float:
    """Nats a token."""
    settings = {"dtype": dtype, "quantization": quantization, "max_num_seqs": 1, "max_num_batched_tokens": 128}
    async with smollm2(**settings) as (engine, model):
        ids = model.tokenizer.encode(TEXT)
        assert 400 < len(ids) < engine.info.max_model_len
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        events = [e async for e in engine.stream(Request(request_id="r", prompt=tuple(ids), sampling=sampling))]
    entries = events[0].prompt_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries if entry is not None] == ids[1:]
    return -math.fsum(entry.logprob for entry in entries if entry is not None) / (len(ids) - 1)


async def test_int8_costs_little() -> None:
    exact = await mean_loss("float32", None)
    rounded = await mean_loss("float32", "int8")
    # Measured: perplexity 13.84 in float32 and 14.55 in int8 on 497 tokens, that is 0.050 nats a token more.
    assert 12.0 < math.exp(exact) < 16.0
    assert abs(rounded - exact) < 0.1
