"""Grouped-query attention over the paged KV cache.

One fused projection gives each KV head its G query heads, its key and its value. A mesh splits all of them by KV
head, so that each shard attends on its own, with its own slice of every page, and nothing is exchanged before the
output projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from jaxserve.models.layers.linear import Linear, Numerics
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.rope import Rotation, rotate
from jaxserve.models.spec import ModelSpec
from jaxserve.pallas.dispatch import Backend, Target
from jaxserve.pallas.paged_attention.api import AttentionConfig, AttentionLayer, RaggedBatch, paged_attention
from jaxserve.sharding.rules import shard_map


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How attention is laid out on the devices.

    Attributes:
        mesh: The mesh, or None for one device.
        kv_repeat: How many times each KV head is repeated so that the mesh divides them.
        backend: Which implementation of paged attention runs; None takes the platform's best.
    """

    mesh: Mesh | None
    kv_repeat: int
    backend: Backend | None

    @property
    def target(self) -> Target:
        """What paged attention is told about where it runs."""
        platform = None if self.mesh is None else self.mesh.devices.flat[0].platform
        return Target(platform=platform, backend=self.backend)

    @property
    def layers_apart(self) -> bool:
        """Whether each layer's parameters are arrays of their own, not entries of a stack.

        A matmul of a GPU takes whole arrays: XLA copies the entry of a stack in each layer of each step, and that moves
        the weights three times instead of once.
        """
        return self.mesh is not None and self.mesh.devices.flat[0].platform == "gpu"


class Attention(nnx.Module):
    """Projections, position embedding, paged attention, output projection."""

    def __init__(self, spec: ModelSpec, *, numerics: Numerics, placement: Placement) -> None:
        kv_heads = spec.num_kv_heads * placement.kv_repeat
        group = spec.num_heads // kv_heads
        model, head = {"embed": spec.hidden_size}, {"head_dim": spec.head_dim}
        per_head = {"kv_heads": kv_heads, "qkv": group + 2, **head}
        self.qkv = Linear(model, per_head, bias=spec.qkv_bias, numerics=numerics)
        self.out = Linear({"kv_heads": kv_heads, "group": group, **head}, model, bias=spec.out_bias, numerics=numerics)
        norm = partial(RMSNorm, spec.head_dim, "head_dim", eps=spec.norm_eps, dtype=numerics.dtype)
        self.q_norm = norm() if spec.qk_norm else None
        self.k_norm = norm() if spec.qk_norm else None
        self.config = AttentionConfig(
            scale=spec.head_dim**-0.5, sliding_window=spec.sliding_window, soft_cap=spec.attention_soft_cap
        )
        self.group = group
        self.placement = placement

    def __call__(
        self,
        x: Float[Array, "T D"],
        kv_pages: Shaped[Array, "P page_size rows lanes"],
        *,
        batch: RaggedBatch,
        layer: AttentionLayer,
        rotation: Rotation,
    ) -> tuple[Float[Array, "T D"], Shaped[Array, "P page_size rows lanes"]]:
        """Attends from each token to its sequence's context; see `pallas.paged_attention.api`."""
        num_tokens = x.shape[0]
        qkv = self.qkv(x)
        kv_heads, head_dim = qkv.shape[1], qkv.shape[3]
        q = qkv[:, :, : self.group].reshape(num_tokens, -1, head_dim)
        k, v = qkv[:, :, self.group], qkv[:, :, self.group + 1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        attended, kv_pages = self._attend(q, k, v, kv_pages, batch, layer)
        return self.out(attended.reshape(num_tokens, kv_heads, self.group, head_dim)), kv_pages

    def _attend(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        kv_pages: Shaped[Array, "P page_size rows lanes"],
        batch: RaggedBatch,
        layer: AttentionLayer,
    ) -> tuple[Array, Array]:
        mesh = self.placement.mesh
        run = partial(paged_attention, config=self.config, target=self.placement.target)
        if mesh is None or mesh.size == 1:
            return run(q, k, v, kv_pages, batch, layer)
        heads, pool = (None, "kv_heads", None), (None, None, "kv_heads", None)
        split = shard_map(
            run,
            mesh,
            in_axes=(heads, heads, heads, pool, None, None),
            out_axes=(heads, pool),
            sizes={"kv_heads": k.shape[1]},
        )
        attended, kv_pages = split(q, k, v, kv_pages, batch, layer)
        return attended, kv_pages
