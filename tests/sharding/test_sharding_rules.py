"""Logical axes to mesh axes: what is split, what is replicated, and how KV heads are made to divide."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import constrain, kv_repeat, partition_spec, sharding_for


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "tensor", "repeat"),
    [
        (32, 8, 1, 1),  # one device
        (32, 8, 8, 1),  # a KV head a shard
        (32, 8, 4, 1),  # several KV heads a shard
        (32, 2, 8, 4),  # more shards than KV heads: each holds the one it needs
        (12, 2, 4, 2),
        (4, 1, 4, 4),  # multi-query attention
        (12, 3, 2, 2),  # does not divide, repeated it does
        (12, 3, 4, 4),
        (9, 3, 2, 1),  # the query heads do not divide: attention is whole on every device
        (14, 2, 4, 1),
    ],
)
def test_kv_heads_are_repeated_until_they_divide(num_heads: int, num_kv_heads: int, tensor: int, repeat: int) -> None:
    mesh = make_mesh(tensor=tensor)
    assert kv_repeat(num_heads, num_kv_heads, mesh) == repeat
    assert num_heads % (num_kv_heads * repeat) == 0
    if num_heads % tensor == 0:
        assert num_kv_heads * repeat % tensor == 0


def test_repetition_is_the_least_that_divides() -> None:
    for tensor in (1, 2, 3, 4, 6, 8):
        mesh = make_mesh(tensor=tensor)
        for num_kv_heads in range(1, 9):
            for group in range(1, 9):
                num_heads = num_kv_heads * group
                fits = [r for r in range(1, group + 1) if group % r == 0 and num_kv_heads * r % tensor == 0]
                expected = fits[0] if num_heads % tensor == 0 and fits else 1
                assert kv_repeat(num_heads, num_kv_heads, mesh) == expected


def test_dimensions_that_do_not_divide_are_replicated() -> None:
    mesh = make_mesh(tensor=4)
    axes = ("layers", "embed", "kv_heads", None, "head_dim")
    assert partition_spec(axes, (2, 64, 8, 4, 16), mesh) == PartitionSpec(None, None, "tensor", None, None)
    assert partition_spec(axes, (2, 64, 6, 4, 16), mesh) == PartitionSpec(None, None, None, None, None)
    assert partition_spec(("experts", "ffn"), (8, 96), make_mesh(expert=2, tensor=4)) == PartitionSpec(
        "expert", "tensor"
    )
    with pytest.raises(ValueError, match=r"shorter|longer"):
        partition_spec(("embed",), (2, 3), mesh)


def test_shards_have_their_share() -> None:
    mesh = make_mesh(data=2, tensor=4)
    sharding = sharding_for(("vocab", "embed"), (256, 8), mesh)
    assert sharding.shard_shape((256, 8)) == (64, 8)
    x = jax.jit(lambda x: constrain(x, ("vocab", "embed"), mesh))(jax.numpy.ones((256, 8)))
    assert x.sharding.is_equivalent_to(sharding, 2)


def test_neighbours_in_tensor_are_neighbours_in_the_device_list() -> None:
    mesh = make_mesh(data=2, tensor=4)
    assert [device.id for device in mesh.devices[1, 0]] == [4, 5, 6, 7]
    assert dict(mesh.shape) == {"data": 2, "expert": 1, "tensor": 4}


def test_mesh_of_more_devices_than_there_are() -> None:
    with pytest.raises(ConfigError, match="needs 16 devices and 8 are visible") as caught:
        make_mesh(data=2, tensor=8)
    assert caught.value.param == "mesh"
