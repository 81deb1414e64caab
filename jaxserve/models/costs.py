"""What a step asks of each device: operations, bytes of memory traffic, exchanges with others, counted by hand.

The counts follow the mathematics of the decoder and the shards its parameters are split into. They are the least a
step can do: every weight read once, every visible key and value read once, activations kept on the chip. A compiler's
own estimate is of no use here, for it counts a scanned layer once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxserve.models.decoder import Blueprint
from jaxserve.models.params import ParamInfo
from jaxserve.sharding.interconnect import Exchange, ExchangeKind
from jaxserve.sharding.mesh import TENSOR
from jaxserve.sharding.rules import sharding_for

TABLE = ".table"
KERNEL = ".kernel"
EMBEDDING = "embed"
"""Prefix of the table that embeds; with tied embeddings it is the one that scores, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What a step computes.

    Attributes:
        num_tokens: T, rows of the batch.
        num_scored: Rows that get logits.
        read_tokens: Cached or new tokens whose keys and values are read, summed over sequences.
        pairs: Visible (query, key) pairs, summed over sequences.
    """

    num_tokens: int
    num_scored: int
    read_tokens: int
    pairs: int

    @classmethod
    def decode(cls, num_seqs: int, context_len: int) -> StepShape:
        """One token for each sequence, which sees `context_len` tokens, itself included."""
        visible = num_seqs * context_len
        return cls(num_tokens=num_seqs, num_scored=num_seqs, read_tokens=visible, pairs=visible)

    @classmethod
    def prefill(cls, num_tokens: int, start: int = 0) -> StepShape:
        """A chunk of one prompt that begins at position `start`."""
        end = start + num_tokens
        pairs = (end * (end + 1) - start * (start + 1)) // 2
        return cls(num_tokens=num_tokens, num_scored=1, read_tokens=end, pairs=pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What a step asks of one device.

    Attributes:
        matmul_flops: Operations on weights (a multiplication and an addition count two).
        attention_flops: Operations on keys and values.
        weight_bytes: Weights read.
        kv_bytes: Keys and values read and written.
        exchanges: What the devices that share a model exchange.
    """

    matmul_flops: int
    attention_flops: int
    weight_bytes: int
    kv_bytes: int
    exchanges: tuple[Exchange, ...]

    @property
    def memory_bytes(self) -> int:
        """Bytes the device's memory moves."""
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Counts steps of a model on a mesh.

    Attributes:
        blueprint: The decoder.
        mesh: Its devices.
        kv_bytes_per_token: Keys and values a token takes on one device, over all layers.
        kv_heads: KV heads as stored, repeated ones counted.
    """

    blueprint: Blueprint
    mesh: Mesh | AbstractMesh
    kv_bytes_per_token: int
    kv_heads: int

    def work(self, shape: StepShape) -> StepWork:
        """What a step asks of each device."""
        return StepWork(
            matmul_flops=2 * self._multiplied(shape),
            attention_flops=4 * self._head_elements() * self.blueprint.spec.num_layers * shape.pairs,
            weight_bytes=self._weights_read(shape),
            kv_bytes=self.kv_bytes_per_token * (shape.read_tokens + shape.num_tokens),
            exchanges=tuple(self._exchanges(shape)),
        )

    def weight_bytes(self) -> int:
        """Bytes of all weights on one device."""
        return sum(self._shard_bytes(info) for info in self.blueprint.params().values())

    def _multiplied(self, shape: StepShape) -> int:
        """Multiplications of a weight with an activation."""
        total = 0
        for path, info in self.blueprint.params().items():
            if path.endswith(KERNEL):
                total += shape.num_tokens * self._shard_size(info)
            elif path.endswith(TABLE) and self._scores(path):
                total += shape.num_scored * self._shard_size(info)
        return total

    def _weights_read(self, shape: StepShape) -> int:
        total = 0
        for path, info in self.blueprint.params().items():
            if path.startswith(EMBEDDING) and not self._scores(path):
                rows = min(shape.num_tokens, info.shape[0])
                total += rows * math.prod(info.shape[1:]) * info.dtype.itemsize
            else:
                total += self._shard_bytes(info)
        return total

    def _scores(self, path: str) -> bool:
        """Whether a table turns hidden states into logits."""
        return not path.startswith(EMBEDDING) or self.blueprint.spec.tie_embeddings

    def _head_elements(self) -> int:
        """Query heads of a device times the head dimension."""
        spec, shards = self.blueprint.spec, self.mesh.shape[TENSOR]
        heads = spec.num_heads // shards if self.kv_heads % shards == 0 else spec.num_heads
        return heads * spec.head_dim

    def _exchanges(self, shape: StepShape) -> Iterator[Exchange]:
        """Sums of the residual stream, and logits put together.

        What is summed is rounded to the activations' dtype before it travels, as XLA does on TPUs.
        """
        spec, params = self.blueprint.spec, self.blueprint.params()
        layers = [self._is_split(params[f"layers.{path}.kernel"]) for path in ("attn.out", "mlp.down")]
        sums = spec.num_layers * sum(layers) + self._is_split(params["embed.table"])
        if sums and shape.num_tokens:
            residual = shape.num_tokens * spec.hidden_size * self.blueprint.dtype.itemsize
            yield Exchange(kind=ExchangeKind.ALL_REDUCE, num_bytes=residual, count=sums)
        head = params["embed.table" if spec.tie_embeddings else "lm_head.table"]
        if self._is_split(head) and shape.num_scored:
            logits = shape.num_scored * spec.vocab_size * 4
            yield Exchange(kind=ExchangeKind.ALL_GATHER, num_bytes=logits, count=1)

    def _is_split(self, info: ParamInfo) -> bool:
        return self._shard_size(info) < math.prod(info.shape)

    def _shard_size(self, info: ParamInfo) -> int:
        return math.prod(sharding_for(info.axes, info.shape, self.mesh).shard_shape(info.shape))

    def _shard_bytes(self, info: ParamInfo) -> int:
        return self._shard_size(info) * info.dtype.itemsize


def device_bytes(tree: object) -> int:
    """Bytes that one device holds of abstract arrays.

    Args:
        tree: A pytree of `jax.ShapeDtypeStruct`; one without a sharding is held whole.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
