"""Collectives read off real compiled programs on eight virtual devices, and off the forms TPUs' HLO has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.sharding.collectives import Collective, collectives
from jaxserve.sharding.mesh import TENSOR, make_mesh

LAYERS = 5


def split(*names: str | None) -> NamedSharding:
    return NamedSharding(make_mesh(tensor=8), PartitionSpec(*names))


def test_an_exchange_in_a_loop_counts_as_often_as_it_turns() -> None:
    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernels: jax.Array) -> tuple[jax.Array, None]:
            hidden = jax.lax.with_sharding_constraint(x @ kernels, split(None, TENSOR))
            return jax.lax.with_sharding_constraint(hidden @ kernels.T, split(None, None)), None

        return jax.lax.scan(layer, x, weights)[0]

    args = (
        jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=split(None, None)),
        jax.ShapeDtypeStruct((LAYERS, 16, 64), jnp.float32, sharding=split(None, None, TENSOR)),
    )
    found = collectives(jax.jit(layers).lower(*args).compile().as_text())
    assert found == (Collective(kind="all-reduce", shape="f32[4,16]", count=LAYERS, num_bytes=4 * 16 * 4),)


def test_a_gather_is_its_result() -> None:
    x = jax.ShapeDtypeStruct((64, 8), jnp.bfloat16, sharding=split(TENSOR, None))
    text = jax.jit(lambda x: x, out_shardings=split(None, None)).lower(x).compile().as_text()
    [gather] = collectives(text)
    assert (gather.kind, gather.count) == ("all-gather", 1)
    assert gather.num_bytes in (64 * 8 * 2, 64 * 8 * 4), "some CPU compilers widen bfloat16"


def test_a_program_of_one_device_exchanges_nothing() -> None:
    assert collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()) == ()


def module(condition: str, loop: str = "") -> str:
    return f"""HloModule jit_decode, is_scheduled=true

FileNames
1 "decoder.py"

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[]{{:T(128)}} parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}}

%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {{
  %all-reduce-start.1 = (bf16[64,128]{{1,0:T(8,128)(2,1)}}, bf16[64,128]{{1,0}}) all-reduce-start(%x), to_apply=%add
  %all-reduce-done.1 = bf16[64,128]{{1,0}} all-reduce-done(%all-reduce-start.1)
}}

%condition (p: (s32[], bf16[64,128])) -> pred[] {{
  {condition}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {{
  %while.1 = (s32[], bf16[64,128]) while(%init), condition=%condition, body=%body{loop}
  ROOT %all-gather.7 = f32[8,16,64]{{1,2,0:T(8,128)S(1)}} all-gather(%y), channel_id=1, dimensions={{0}}
}}
"""


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (module("%n = s32[]{:T(128)} constant(80)"), 80),
        (module("%n = s32[] parameter(1)", ', backend_config={"known_trip_count":{"n":"36"}}'), 36),
        (module("%n = s32[] parameter(1)"), 1),
    ],
    ids=["compared with a constant", "written down", "unknown"],
)
def test_asynchronous_exchanges_and_trip_counts(text: str, turns: int) -> None:
    assert collectives(text) == (
        Collective(kind="all-gather", shape="f32[8,16,64]", count=1, num_bytes=8 * 16 * 64 * 4),
        Collective(kind="all-reduce", shape="bf16[64,128]", count=turns, num_bytes=64 * 128 * 2),
    )
