"""Estimates against cases computed by hand: steps, prompts, and what users see."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.config import ServeConfig
from jaxserve.launch.estimate import Bound, Estimator, Workload
from jaxserve.launch.fit import costs_of, estimator_of
from jaxserve.models.costs import StepShape
from jaxserve.sharding.topology import parse_topology

LLAMA = "llama-3.3-70b"
LOAD = Workload(input_len=1024, output_len=256, concurrency=64)
CONFIG = ServeConfig(model=LLAMA)

# Llama 3.3 70B over eight devices in bfloat16, by hand: 80 layers of 8192 x (8192 + 2 x 1024) + 8192 x 8192 +
# 3 x 8192 x 28672 weights, a head of 128256 x 8192; per token and layer a key and a value of one head of 128.
LAYER = 8192 * 10240 + 8192 * 8192 + 3 * 8192 * 28672
HEAD = 128256 * 8192
READ = 2 * (80 * LAYER + HEAD) / 8


def estimator(step_tokens: int = 2048) -> Estimator:
    topology = parse_topology("v6e:2x4")
    return estimator_of(costs_of(spec_of(LLAMA), 8, CONFIG, "tpu"), topology, CONFIG, step_tokens=step_tokens)


def test_a_decode_step_by_hand() -> None:
    step = estimator().step("decode", StepShape.decode(64, 2048))
    norms, embedded = 161 * 8192 * 2, 64 * 8192 * 2
    kv = 80 * 2 * 128 * 2 * (64 * 2048 + 64)
    assert step.memory_s == pytest.approx((READ + norms + embedded + kv) / 1640e9, rel=1e-12)
    flops = 2 * 64 * (80 * LAYER + HEAD) / 8 + 4 * 80 * 8 * 128 * 64 * 2048
    assert step.compute_s == pytest.approx(flops / 918e12, rel=1e-12)
    # 161 sums of 1 MiB over 20 links of 100 GB/s each way; the logits' 7/8 into a corner that has two links.
    summed = 161 * 64 * 8192 * 2 * 2 * 7 / 20 / 100e9
    gathered = 64 * 128256 * 4 * 7 / 8 / 2 / 100e9
    assert step.interconnect_s == pytest.approx(summed + gathered, rel=1e-12)
    assert step.bound is Bound.MEMORY
    assert step.seconds == step.memory_s
    assert step.in_turn_s == step.memory_s + step.interconnect_s
    # 17.4 GB of weights and 5.4 GB of keys and values at 1.64 TB/s.
    assert step.memory_s == pytest.approx(13.9e-3, rel=0.01)


def test_a_step_of_one_waits_for_every_message_to_cross_the_slice() -> None:
    """16 KiB are sent in less than the 4 microseconds that news takes over 4 links, 162 times."""
    step = estimator().step("decode", StepShape.decode(1, 2048))
    assert step.interconnect_s == pytest.approx(162 * 4e-6)


def test_a_prefill_by_hand() -> None:
    step = estimator().step("prefill", StepShape.prefill(2048))
    flops = 2 * 2048 * 80 * LAYER / 8 + 2 * HEAD / 8 + 4 * 80 * 8 * 128 * (2048 * 2049 // 2)
    assert step.compute_s == pytest.approx(flops / 918e12, rel=1e-12)
    assert step.interconnect_s == pytest.approx(161 * 2048 * 8192 * 2 * 14 / 20 / 100e9 + 4e-6, rel=1e-9)
    assert step.memory_s < step.interconnect_s < step.compute_s
    assert step.bound is Bound.COMPUTE
    assert step.seconds == step.compute_s


@pytest.mark.parametrize(("slice_name", "rate"), [("v6e:2x4", 918e12 / 6), ("h100:8", 67e12)])
def test_float32_is_not_rounded(slice_name: str, rate: float) -> None:
    """Six passes of bfloat16 on TPUs, no tensor cores on Hopper; its weights are twice as many bytes."""
    topology, config = parse_topology(slice_name), ServeConfig(model=LLAMA, dtype="float32")
    costs = costs_of(spec_of(LLAMA), 8, config, topology.chip.platform)
    step = estimator_of(costs, topology, config, step_tokens=2048).step("prefill", StepShape.prefill(2048))
    flops = 2 * 2048 * 80 * LAYER / 8 + 2 * HEAD / 8 + 4 * 80 * 8 * 128 * (2048 * 2049 // 2)
    assert step.compute_s == pytest.approx(flops / rate, rel=1e-12)
    norms, embedded, kv = 161 * 8192 * 4, 2048 * 8192 * 4, 80 * 2 * 128 * 4 * 2 * 2048
    assert step.memory_s == pytest.approx((2 * READ + norms + embedded + kv) / topology.chip.hbm_bytes_per_s, rel=1e-12)


def test_a_prompt_is_its_chunks() -> None:
    each = estimator()
    chunks = [
        StepShape.prefill(2048, last=False),
        StepShape.prefill(2048, 2048, last=False),
        StepShape.prefill(904, 4096),
    ]
    assert each.prefill_s(5000) == pytest.approx(sum(each.step("", chunk).seconds for chunk in chunks))
    assert each.prefill_s(5000, in_turn=True) == pytest.approx(sum(each.step("", chunk).in_turn_s for chunk in chunks))


def test_what_users_see_at_first() -> None:
    each = estimator()
    seen, in_turn = each.service(LOAD), each.service(LOAD, in_turn=True)
    decode, prefill = each.step("", StepShape.decode(64, 1024 + 128)), each.step("", StepShape.prefill(1024))
    assert (seen.ttft_s, seen.tpot_s) == (prefill.seconds, decode.seconds)
    assert (in_turn.ttft_s, in_turn.tpot_s) == (prefill.in_turn_s, decode.in_turn_s)


def test_short_prompts_ride_along_with_decodes() -> None:
    """64 requests of 32 + 32 tokens take 32 steps of 126 tokens: 64 prompts of 32 and 64 x 31 decodes.

    A step reads 17.378 GB of weights, 2 MB of embeddings, and of each of two requests 32 keys and values for its prompt
    and 33 to 63 for its decodes: with 126 new ones 3,166, 40 KiB each, 130 MB. At 1.64 TB/s that is 10.677 ms. 161 sums
    of 126 x 16 KiB, 14 times over 20 links of 100 GB/s, are 2.327 ms; 64 rows of logits 0.144.
    """
    load = Workload(input_len=32, output_len=32, concurrency=64)
    steps, average = estimator(1024).steady_state(load)
    assert (steps, average.num_tokens, average.num_scored) == (32, 126, 64)
    assert (average.read_tokens, average.pairs) == (3040, 2 * 63 * 64 // 2)
    best, in_turn = estimator(1024).service(load), estimator(1024).service(load, in_turn=True)
    assert best.output_tokens_per_s == pytest.approx(64 * 32 / (32 * 10.677e-3), rel=2e-4)
    assert in_turn.output_tokens_per_s == pytest.approx(64 * 32 / (32 * 13.147e-3), rel=2e-4)


def test_prompts_alone_fill_whole_steps() -> None:
    """64 requests of 128 + 1 tokens take 8 steps of 1,024, 17.5 TFLOP a device each: 19.114 ms at 918 TFLOP/s."""
    load = Workload(input_len=128, output_len=1, concurrency=64)
    steps, average = estimator(1024).steady_state(load)
    assert (steps, average.num_tokens, average.num_scored) == (8, 1024, 8)
    assert estimator(1024).service(load).output_tokens_per_s == pytest.approx(64 / (8 * 19.114e-3), rel=2e-4)


def test_a_long_prompt_takes_the_steps_of_its_chunks() -> None:
    """2,500 tokens are chunks of 1,024, 1,024 and 452, which read 1,024 + 2,048 + 2,500 keys and values."""
    steps, average = estimator(1024).steady_state(Workload(input_len=2500, output_len=3, concurrency=1))
    assert steps == 5
    assert average.num_tokens == pytest.approx(2502 / 5)
    assert average.num_scored == pytest.approx(3 / 5)
    assert average.read_tokens == pytest.approx((1024 + 2048 + 2500 + 2501 + 2502) / 5)


def test_windows_bound_what_is_read() -> None:
    """Of a request of 32 + 32 tokens the first 16 see 1 to 16, the other 47 see 16: 136 + 752 pairs.

    Its prompt reads 32 keys and values, each of its 31 decodes 16.
    """
    spec = dataclasses.replace(spec_of(LLAMA), sliding_window=16)
    each = estimator_of(costs_of(spec, 8, CONFIG, "tpu"), parse_topology("v6e:2x4"), CONFIG, step_tokens=1024)
    _, average = each.steady_state(Workload(input_len=32, output_len=32, concurrency=64))
    assert (average.read_tokens, average.pairs) == (2 * (32 + 31 * 16), 2 * (136 + 752))
    assert each.decode(64, 4096) == StepShape.decode(64, 16)
    assert each.chunks(4096)[3].read_tokens == 1024 + 15
