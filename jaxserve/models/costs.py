"""What a step asks of each device: operations, bytes of memory traffic, exchanges with others, counted by hand.

The counts follow the mathematics of the decoder and the shards its parameters are split into. They are the least a
step can do: every weight read once, every visible key and value read once, activations kept on the chip. A compiler's
own estimate is of no use here, for it counts a scanned layer once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
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
HEAD = "lm_head"
"""Prefix of the table that scores, if it is another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What a step computes, or several steps on average: then its numbers may be fractions.

    Attributes:
        num_tokens: T, rows of the batch.
        num_scored: Rows that get logits.
        read_tokens: Cached or new tokens whose keys and values are read, summed over sequences.
        pairs: Visible (query, key) pairs, summed over sequences.
    """

    num_tokens: float
    num_scored: float
    read_tokens: float
    pairs: float

    @classmethod
    def decode(cls, num_seqs: int, context_len: int, *, window: int | None = None) -> StepShape:
        """One token for each sequence.

        Args:
            num_seqs: How many there are.
            context_len: Tokens of each, the new one included.
            window: How many tokens up to itself a token sees; None if all.
        """
        visible = num_seqs * (context_len if window is None else min(context_len, window))
        return cls(num_tokens=num_seqs, num_scored=num_seqs, read_tokens=visible, pairs=visible)

    @classmethod
    def prefill(cls, num_tokens: int, start: int = 0, *, last: bool = True, window: int | None = None) -> StepShape:
        """A chunk of one prompt.

        Args:
            num_tokens: Tokens of the chunk.
            start: Position of its first token.
            last: Whether the prompt ends with it, so that its last token is scored.
            window: How many tokens up to itself a token sees; None if all.
        """
        end = start + num_tokens
        unseen = 0 if window is None else max(0, start + 1 - window)
        return cls(
            num_tokens=num_tokens,
            num_scored=int(last),
            read_tokens=end - unseen,
            pairs=visible_pairs(end, window) - visible_pairs(start, window),
        )


def visible_pairs(num_tokens: int, window: int | None) -> int:
    """(query, key) pairs of a sequence from its first token on, each token seeing itself and what came before.

    Args:
        num_tokens: Tokens of the sequence.
        window: How many tokens up to itself a token sees; None if all.
    """
    growing = num_tokens if window is None else min(num_tokens, window)
    return growing * (growing + 1) // 2 + (num_tokens - growing) * growing


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

    matmul_flops: float
    attention_flops: float
    weight_bytes: float
    kv_bytes: float
    exchanges: tuple[Exchange, ...]

    @property
    def memory_bytes(self) -> float:
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
        return weight_bytes(self.blueprint.params(), self.mesh)

    def _multiplied(self, shape: StepShape) -> float:
        """Multiplications of a weight with an activation."""
        total: float = 0
        for path, info in self.blueprint.params().items():
            if path.endswith(KERNEL):
                total += shape.num_tokens * self._shard_size(info)
            elif path.endswith(TABLE) and self._scores(path):
                total += shape.num_scored * self._shard_size(info)
        return total

    def _weights_read(self, shape: StepShape) -> float:
        """Bytes of weights read: of the embedding the rows looked up, the head if there is anything to score.

        On average over steps that score less than a row each, the head is read in as many of them as there are rows.
        """
        scoring = min(shape.num_scored, 1)
        total: float = 0
        for path, info in self.blueprint.params().items():
            whole = self._shard_size(info) * info.dtype.itemsize
            if path.startswith(EMBEDDING):
                rows = min(shape.num_tokens, info.shape[0])
                looked_up = rows * math.prod(info.shape[1:]) * info.dtype.itemsize
                total += max(looked_up, scoring * whole if self._scores(path) else 0)
            else:
                total += scoring * whole if path.startswith(HEAD) else whole
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
        """Sums of the residual stream, and logits put together."""
        for num_bytes, count in self._sums(shape).items():
            yield Exchange(kind=ExchangeKind.ALL_REDUCE, num_bytes=num_bytes, count=count)
        spec, params = self.blueprint.spec, self.blueprint.params()
        head = params["embed.table" if spec.tie_embeddings else "lm_head.table"]
        if self._is_split(head) and shape.num_scored:
            logits = int(shape.num_scored * spec.vocab_size * 4)
            yield Exchange(kind=ExchangeKind.ALL_GATHER, num_bytes=logits, count=1)

    def _sums(self, shape: StepShape) -> Counter[int]:
        """How often the devices sum (or take the maximum of) arrays of so many bytes.

        The residual stream is summed after each split projection and after a split embedding, rounded to the
        activations' dtype before it travels, as XLA does on TPUs. Split int8 projections first agree on the largest
        activation of each row, by which it is quantised, and sum integers; an int8 embedding sends its rows as they
        are, and a scale a row.
        """
        spec, params = self.blueprint.spec, self.blueprint.params()
        sums = Counter[int]()
        for path, times, integer in (
            ("layers.attn.out.kernel", spec.num_layers, jnp.dtype(jnp.int32)),
            ("layers.mlp.down.kernel", spec.num_layers, jnp.dtype(jnp.int32)),
            ("embed.table", 1, jnp.dtype(jnp.int8)),
        ):
            if not shape.num_tokens or not self._is_split(params[path]):
                continue
            is_int8 = params[path].dtype == jnp.int8
            dtype = integer if is_int8 else self.blueprint.dtype
            sums[int(shape.num_tokens * spec.hidden_size * dtype.itemsize)] += times
            if is_int8:
                sums[int(shape.num_tokens * jnp.dtype(jnp.float32).itemsize)] += times
        return sums

    def _is_split(self, info: ParamInfo) -> bool:
        return self._shard_size(info) < math.prod(info.shape)

    def _shard_size(self, info: ParamInfo) -> int:
        return _shard_size(info, self.mesh)


def weight_bytes(params: Mapping[str, ParamInfo], mesh: Mesh | AbstractMesh) -> int:
    """Bytes of all parameters on one device.

    Args:
        params: By path, as a `Blueprint` declares them.
        mesh: What they are split over.
    """
    return sum(_shard_size(info, mesh) * info.dtype.itemsize for info in params.values())


def _shard_size(info: ParamInfo, mesh: Mesh | AbstractMesh) -> int:
    """Elements of a parameter on one device."""
    return math.prod(sharding_for(info.axes, info.shape, mesh).shard_shape(info.shape))


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
