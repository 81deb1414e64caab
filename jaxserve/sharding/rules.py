"""Logical axes to mesh axes: the one table that says how a parameter or an activation is split.

Layers name the axes of what they create ("kv_heads", "ffn", ...); this file decides which mesh axis each is split
over. A dimension that its mesh axis does not divide is replicated, never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.sharding.mesh import EXPERT, TENSOR

Axes: TypeAlias = tuple[str | None, ...] | None

MESH_AXIS_OF: Mapping[str, str] = {
    "vocab": TENSOR,
    "kv_heads": TENSOR,
    "heads": TENSOR,
    "ffn": TENSOR,
    "experts": EXPERT,
}
"""Logical axes that are split; every other one ("layers", "embed", "head_dim", "tokens", ...) is replicated."""


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array whose dimensions carry these logical axes.

    Args:
        axes: One logical axis a dimension, or None.
        shape: Global shape, to see which dimensions divide.
        mesh: The mesh to split over.
    """
    names: list[str | None] = []
    for axis, dim in zip(axes, shape, strict=True):
        name = MESH_AXIS_OF.get(axis) if axis is not None else None
        names.append(name if name is not None and dim % mesh.shape[name] == 0 else None)
    return PartitionSpec(*names)


def sharding_for(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """`partition_spec` bound to the mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh) -> jax.Array:
    """Pins an activation inside a jitted function to the split its logical axes ask for."""
    if mesh.size == 1:
        return x
    pinned: jax.Array = jax.lax.with_sharding_constraint(x, sharding_for(axes, x.shape, mesh))
    return pinned


def kv_repeat(num_heads: int, num_kv_heads: int, mesh: Mesh | AbstractMesh) -> int:
    """How many times each KV head is repeated so that the tensor axis divides the KV heads.

    With more tensor shards than KV heads, each shard holds the one KV head its query heads need. If the query heads
    themselves do not divide, attention is replicated whole and nothing is repeated.
    """
    tensor = mesh.shape[TENSOR]
    if num_heads % tensor != 0 or num_kv_heads % tensor == 0:
        return 1
    q_per_kv = num_heads // num_kv_heads
    for repeat in range(2, q_per_kv + 1):
        if q_per_kv % repeat == 0 and (num_kv_heads * repeat) % tensor == 0:
            return repeat
    return 1


def shard_map(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    in_axes: Sequence[Axes],
    out_axes: Sequence[Axes],
    sizes: Mapping[str, int],
) -> Callable[..., Any]:
    """Runs a function once a shard, each seeing its part of the dimensions that carry a split axis.

    Args:
        function: Takes and returns arrays (or pytrees, where the axes are None).
        mesh: The mesh to split over.
        in_axes: Logical axes of each argument; None for an argument that every shard sees whole.
        out_axes: The same for the results.
        sizes: Global size of each logical axis named above; one that its mesh axis does not divide is not split.
    """

    def spec(axes: Axes) -> PartitionSpec:
        if axes is None:
            return PartitionSpec()
        return partition_spec(axes, [sizes[axis] if axis is not None else 1 for axis in axes], mesh)

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(spec(axes) for axes in in_axes),
        out_specs=tuple(spec(axes) for axes in out_axes),
        check_vma=False,
    )
