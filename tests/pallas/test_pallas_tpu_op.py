"""The TPU op around its kernels: which of them it calls on which chip, and what it leaves to plain XLA."""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxserve.bench.tiled_kernels import core_of
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.tpu.calls import current_core
from jaxserve.pallas.paged_attention.tpu.op import paged_attention_tpu
from jaxserve.sharding.chips import CHIPS, Chip

PLAIN = AttentionConfig(scale=0.1, sliding_window=None, soft_cap=None)

TPUS = [chip for chip in CHIPS.values() if chip.platform == "tpu"]


def traced_for(device_kind: str) -> AbstractContextManager[object]:
    """As if a program for a device of JAX's name were traced."""
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_kernels_see_the_core_that_tiles_are_tuned_for(chip: Chip) -> None:
    with traced_for(chip.device_kind):
        assert current_core() == core_of(chip)


def test_without_a_tpu_nothing_is_tuned() -> None:
    assert current_core().chip is None


def kernels(*, num_seqs: int = 64, head_dim: int = 128, page_size: int = 64, pages_per_seq: int = 64) -> list[str]:
    """Names of the kernels of a program for a v7x: 32 query heads, 8 KV heads, a row of the batch for each sequence."""

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def values(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    batch = RaggedBatch(  # type: ignore[arg-type]  # shapes stand for arrays
        page_table=numbers(num_seqs, pages_per_seq),
        context_lens=numbers(num_seqs),
        query_starts=numbers(num_seqs + 1),
        num_seqs=numbers(),
        num_decodes=numbers(),
        positions=numbers(num_seqs),
        token_seq=numbers(num_seqs),
    )
    layer = AttentionLayer(page_offset=numbers())  # type: ignore[arg-type]  # shapes stand for arrays
    new, pool = values(num_seqs, 8, head_dim), values(100, page_size, 16, head_dim)
    with traced_for("TPU7x"):
        program = jax.make_jaxpr(functools.partial(paged_attention_tpu, config=PLAIN))(
            values(num_seqs, 32, head_dim), new, new, pool, batch, layer
        )
    calls = [each for each in program.jaxpr.eqns if each.primitive.name == "pallas_call"]
    return [str(each.params["name"]) for each in calls]


def test_decodes_have_their_kernel(caplog: pytest.LogCaptureFixture) -> None:
    assert kernels() == ["paged_attention_decode", "paged_attention_prefill"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_seqs": 4096}, "MiB of VMEM"),
        ({"page_size": 8, "pages_per_seq": 50_000}, "SMEM"),
        ({"head_dim": 64}, "h64"),
    ],
    ids=["many sequences", "long tables", "narrow heads"],
)
def test_decodes_that_do_not_fit_go_through_prefill_and_are_logged_once(
    sizes: dict[str, int], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert kernels(**sizes) == ["paged_attention_prefill"]
    (record,) = caplog.records
    assert "the prefill kernel decodes 32,8" in record.getMessage()
    assert reason in record.getMessage()


def test_tables_that_scalar_memory_cannot_hold_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="131072 pages do not fit into SMEM"):
        kernels(page_size=1, pages_per_seq=131_072)
