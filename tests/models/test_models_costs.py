"""Counted work against counts made by hand from the published shapes of Llama 3.3 70B and Qwen3 0.6B."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from jaxserve.checkpoint.presets import default_presets_dir, read_preset
from jaxserve.models import registry
from jaxserve.models.costs import CostModel, StepShape
from jaxserve.models.decoder import Blueprint
from jaxserve.sharding.interconnect import Exchange, ExchangeKind
from jaxserve.sharding.mesh import make_mesh


def model(name: str, tensor: int, quantization: str | None = None) -> CostModel:
    preset = read_preset(name, default_presets_dir())
    assert preset is not None
    spec = registry.spec_from_hf(preset.config, {}, name)
    mesh: Mesh = make_mesh(tensor=tensor, devices=jax.devices())
    blueprint = Blueprint.of(spec, dtype=jnp.dtype("bfloat16"), quantization=quantization, mesh=mesh)
    per_token = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 2 // tensor
    return CostModel(blueprint=blueprint, mesh=mesh, kv_bytes_per_token=per_token, kv_heads=spec.num_kv_heads)


# Llama 3.3 70B: 80 layers, 8192 wide, 64 query and 8 KV heads of 128, ffn 28672, vocabulary 128256.
LAYER = 8192 * 8192 + 2 * 8192 * 1024 + 8192 * 8192 + 3 * 8192 * 28672
TABLE = 128256 * 8192


def test_decode_of_70b_on_eight_devices() -> None:
    work = model("llama-3.3-70b", 8).work(StepShape.decode(64, 2048))
    assert work.matmul_flops == 2 * 64 * (80 * LAYER + TABLE) // 8
    # Scores and weighted sums: 2 operations each, for every visible token, head element and layer.
    assert work.attention_flops == 4 * 80 * (64 * 128 // 8) * 64 * 2048
    assert work.kv_bytes == 80 * 2 * (8 // 8) * 128 * 2 * (64 * 2048 + 64)
    norms = (80 * 2 + 1) * 8192 * 2
    embedded = 64 * 8192 * 2
    assert work.weight_bytes == (80 * LAYER + TABLE) // 8 * 2 + norms + embedded


def test_exchanges_of_70b_on_eight_devices() -> None:
    """80 layers sum twice and the embedding once; the head gathers float32 logits."""
    work = model("llama-3.3-70b", 8).work(StepShape.decode(64, 2048))
    assert work.exchanges == (
        Exchange(kind=ExchangeKind.ALL_REDUCE, num_bytes=64 * 8192 * 2, count=2 * 80 + 1),
        Exchange(kind=ExchangeKind.ALL_GATHER, num_bytes=64 * 128256 * 4, count=1),
    )


def test_exchanges_of_int8() -> None:
    """160 sums of int32 and 160 maxima of a row each; the embedding's rows are sent as int8, with a scale each."""
    work = model("llama-3.3-70b", 8, "int8").work(StepShape.decode(64, 2048))
    assert work.exchanges == (
        Exchange(kind=ExchangeKind.ALL_REDUCE, num_bytes=64 * 8192 * 4, count=160),
        Exchange(kind=ExchangeKind.ALL_REDUCE, num_bytes=64 * 4, count=161),
        Exchange(kind=ExchangeKind.ALL_REDUCE, num_bytes=64 * 8192, count=1),
        Exchange(kind=ExchangeKind.ALL_GATHER, num_bytes=64 * 128256 * 4, count=1),
    )


def test_weights_of_70b_are_seventy_billion_parameters() -> None:
    assert model("llama-3.3-70b", 1).weight_bytes() == 2 * (80 * LAYER + 2 * TABLE + 161 * 8192)


def test_int8_halves_the_matrices() -> None:
    full, small = model("llama-3.3-70b", 8), model("llama-3.3-70b", 8, "int8")
    assert 0.5 < small.weight_bytes() / full.weight_bytes() < 0.51
    shape = StepShape.decode(8, 100)
    assert small.work(shape).matmul_flops == full.work(shape).matmul_flops


def test_one_device_exchanges_nothing() -> None:
    assert model("qwen3-0.6b", 1).work(StepShape.decode(4, 10)).exchanges == ()


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (512, 0), (512, 1536)])
def test_prefill_sees_each_pair_once(tokens: int, start: int) -> None:
    shape = StepShape.prefill(tokens, start)
    assert shape.pairs == sum(position + 1 for position in range(start, start + tokens))
    assert shape.read_tokens == start + tokens
    assert shape.num_scored == 1
    assert StepShape.prefill(tokens, start, last=False).num_scored == 0


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (3, 0), (10, 0), (3, 2), (10, 30)])
def test_a_window_hides_what_is_farther_back(tokens: int, start: int) -> None:
    shape = StepShape.prefill(tokens, start, window=4)
    seen = [set(range(max(0, position - 3), position + 1)) for position in range(start, start + tokens)]
    assert shape.pairs == sum(map(len, seen))
    assert shape.read_tokens == len(set().union(*seen))
    assert StepShape.decode(3, start + 1, window=4).read_tokens == 3 * len(seen[0])
    assert StepShape.decode(3, start + 1, window=4).pairs == 3 * len(seen[0])


def test_a_step_that_scores_nothing_reads_no_head() -> None:
    costs = model("llama-3.3-70b", 8)
    ended, under_way = costs.work(StepShape.prefill(16)), costs.work(StepShape.prefill(16, last=False))
    assert ended.weight_bytes - under_way.weight_bytes == 128256 * 8192 * 2 // 8
    assert ended.matmul_flops - under_way.matmul_flops == 2 * 128256 * 8192 // 8
    assert [each.kind for each in under_way.exchanges] == [ExchangeKind.ALL_REDUCE]


def test_a_tied_table_is_read_once_and_multiplied() -> None:
    # Qwen3 0.6B ties its embeddings: 28 layers, 1024 wide, 16 and 8 heads of 128, ffn 3072, vocabulary 151936.
    work = model("qwen3-0.6b", 1).work(StepShape.decode(1, 1))
    layer = 1024 * (16 + 2 * 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072
    table = 151936 * 1024
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert work.weight_bytes == 2 * (28 * layer + table + norms)
    assert work.matmul_flops == 2 * (28 * layer + table)
