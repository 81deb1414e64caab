"""The pool's layout: which heads it is made for."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxserve.kv.pool import held_heads, tiled


@pytest.mark.parametrize(
    ("heads", "dtype", "num_shards", "held"),
    [
        pytest.param((3, 64), "bfloat16", 1, (4, 128), id="the demo model's"),
        pytest.param((8, 64), "bfloat16", 4, (8, 128), id="two a device, narrow"),
        pytest.param((8, 96), "int8", 1, (8, 128), id="int8"),
        pytest.param((6, 64), "bfloat16", 2, (8, 128), id="three a device become four"),
        pytest.param((8, 128), "bfloat16", 8, (8, 128), id="as they are"),
        pytest.param((8, 256), "bfloat16", 1, (8, 256), id="wider than a tile"),
        pytest.param((12, 64), "bfloat16", 1, (12, 64), id="16 would take more memory"),
        pytest.param((3, 64), "bfloat16", 2, (3, 64), id="not split"),
    ],
)
def test_heads_are_padded_where_it_costs_nothing(
    heads: tuple[int, int], dtype: str, num_shards: int, held: tuple[int, int]
) -> None:
    element = jnp.dtype(dtype)
    found = held_heads(*heads, element, num_shards=num_shards)
    assert found == held
    if heads[0] % num_shards == 0:
        rows = [2 * num // num_shards for num in (heads[0], found[0])]
        assert tiled(rows[0], heads[1], element) == tiled(rows[1], found[1], element)
