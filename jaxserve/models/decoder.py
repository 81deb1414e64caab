"""The one decoder: every family is a spec of it.

A decoder is built abstractly (`nnx.eval_shape`), so its parameters are declared once and exist nowhere until the
loader makes them. At run time the layers are one stack walked by `lax.scan`, so that neither compile time nor
dispatch grows with depth, except on GPUs, where they lie apart; the KV pool goes from layer to layer and is changed in
place, each layer finding its pages at `layer * num_pages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Shaped

from jaxserve.models.layers.attention import Attention, Placement
from jaxserve.models.layers.linear import Numerics, Table
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.rope import Rotation, rotation
from jaxserve.models.params import Held, ParamInfo
from jaxserve.models.spec import ModelSpec
from jaxserve.pallas.dispatch import Backend
from jaxserve.pallas.paged_attention.api import AttentionLayer, RaggedBatch, prepared
from jaxserve.sharding.rules import constrain

State = TypeVar("State")
"""What goes from layer to layer."""

Step: TypeAlias = Callable[[State, nnx.State[Any, Any], Array], State]
"""A layer: what it is given, its parameters, its index -> what it hands on."""

STACK = "layers"
"""Logical axis, and path prefix, of the parameters that have one entry a layer."""


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, spec: ModelSpec, *, numerics: Numerics, placement: Placement) -> None:
        self.attn_norm = RMSNorm(spec.hidden_size, "embed", eps=spec.norm_eps, dtype=numerics.dtype)
        self.attn = Attention(spec, numerics=numerics, placement=placement)
        self.mlp_norm = RMSNorm(spec.hidden_size, "embed", eps=spec.norm_eps, dtype=numerics.dtype)
        self.mlp = MLP(spec, numerics=numerics)

    def __call__(
        self,
        x: Float[Array, "T D"],
        kv_pages: Shaped[Array, "P page_size K2 H"],
        *,
        batch: RaggedBatch,
        layer: AttentionLayer,
        rotation: Rotation,
    ) -> tuple[Float[Array, "T D"], Shaped[Array, "P page_size K2 H"]]:
        """One layer's share of the residual stream, and the pool with its keys and values."""
        with jax.named_scope("attention"):
            attended, kv_pages = self.attn(self.attn_norm(x), kv_pages, batch=batch, layer=layer, rotation=rotation)
            x = x + attended
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.mlp_norm(x))
        return x, kv_pages


class Decoder(nnx.Module):
    """Token ids in, hidden states out; `logits` turns the few that are needed into scores.

    Args:
        spec: The model.
        numerics: Dtype and quantisation.
        placement: Mesh and attention backend.
    """

    def __init__(self, spec: ModelSpec, *, numerics: Numerics, placement: Placement) -> None:
        self.embed = Table(spec.vocab_size, spec.hidden_size, numerics=numerics)
        self.layers = nnx.vmap(
            lambda: DecoderLayer(spec, numerics=numerics, placement=placement),
            in_axes=(),
            out_axes=0,
            axis_size=spec.num_layers,
        )()
        self.final_norm = RMSNorm(spec.hidden_size, "embed", eps=spec.norm_eps, dtype=numerics.dtype)
        tied = spec.tie_embeddings
        self.lm_head = None if tied else Table(spec.vocab_size, spec.hidden_size, numerics=numerics)
        self.spec = spec
        self.mesh = placement.mesh
        self.placement = placement

    def __call__(
        self,
        token_ids: Int32[Array, " T"],
        kv_pages: Shaped[Array, "P page_size K2 H"],
        batch: RaggedBatch,
        *,
        max_len: int,
    ) -> tuple[Float[Array, "T D"], Shaped[Array, "P page_size K2 H"]]:
        """Runs a ragged batch, writing its keys and values into the pages.

        Args:
            token_ids: [T]; padding may hold any id.
            kv_pages: [L * num_pages, page_size, 2K, H]; donate it.
            batch: Which token belongs where.
            max_len: Longest sequence that is served, in tokens; some ropes depend on it.

        Returns:
            Normalised hidden states, [T, D], and the pool.
        """
        spec = self.spec
        num_pages = kv_pages.shape[0] // spec.num_layers
        with jax.named_scope("embed"):
            x = self._whole(self.embed.rows(token_ids))
        group = spec.num_heads // (spec.num_kv_heads * self.placement.kv_repeat)
        batch = prepared(batch, group=group, target=self.placement.target)
        turns = rotation(spec.rope, spec.head_dim, batch.positions, max_len)
        graph, stacked = nnx.split(self.layers)

        def step(state: tuple[Array, Array], params: nnx.State[Any, Any], index: Array) -> tuple[Array, Array]:
            x, pages = state
            layer = AttentionLayer(page_offset=index * num_pages)
            x, pages = nnx.merge(graph, params)(x, pages, batch=batch, layer=layer, rotation=turns)
            return self._whole(x), pages

        x, kv_pages = walk(step, (x, kv_pages), stacked, spec.num_layers, apart=self.placement.layers_apart)
        return self.final_norm(x), kv_pages

    def logits(self, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """Scores over the vocabulary, float32, for hidden states that `__call__` returned."""
        with jax.named_scope("logits"):
            table = self.embed if self.lm_head is None else self.lm_head
            # Pinned first to the split of the table, lest the table be gathered instead of the logits.
            logits = self._whole(self._split(table.logits(hidden), (None, "vocab")))
            cap = self.spec.logit_soft_cap
            return logits if cap is None else jnp.float32(cap) * jnp.tanh(logits / jnp.float32(cap))

    def _whole(self, x: Array) -> Array:
        """Keeps an activation whole on every device of the mesh."""
        return self._split(x, (None,) * x.ndim)

    def _split(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        """Splits an activation as its logical axes ask for."""
        return x if self.mesh is None else constrain(x, axes, self.mesh)


def walk(step: Step[State], state: State, stacked: nnx.State[Any, Any], num_layers: int, *, apart: bool) -> State:
    """Takes a step a layer, from the first to the last.

    Args:
        step: What a layer makes of a state, given its parameters and its index.
        state: What the first layer is given.
        stacked: The layers' parameters: arrays with a first dimension of layers, or tuples of one array a layer.
        num_layers: L.
        apart: Whether they are tuples. Then each layer has code of its own; it is traced only once.

    Returns:
        What the last layer makes.
    """
    indices = jnp.arange(num_layers, dtype=jnp.int32)
    if not apart:
        return jax.lax.scan(lambda state, layer: (step(state, *layer), None), state, (stacked, indices))[0]
    once = jax.jit(step)
    for index in range(num_layers):
        params = jax.tree.map(lambda each, at=index: each[at], stacked, is_leaf=lambda each: isinstance(each, tuple))
        state = once(state, params, indices[index])
    return state


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A decoder without its parameters: what to load, and how to put it together inside a jitted function.

    Attributes:
        spec: The model.
        dtype: Of activations.
        graph: The decoder's structure.
        state: Its abstract parameters.
        layers_apart: Whether programs take each layer's parameters as arrays of their own.
    """

    spec: ModelSpec
    dtype: jnp.dtype
    graph: nnx.GraphDef[Decoder]
    state: nnx.State[Any, Any]
    layers_apart: bool

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        *,
        dtype: jnp.dtype,
        quantization: str | None = None,
        mesh: Mesh | None = None,
        kv_repeat: int = 1,
        backend: Backend | None = None,
    ) -> Blueprint:
        """Declares the decoder of a spec; no array is made."""
        on_cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"
        numerics = Numerics(dtype=jnp.dtype(dtype), quantization=quantization, inputs_last=on_cpu)
        placement = Placement(mesh=mesh, kv_repeat=kv_repeat, backend=backend)
        graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(spec, numerics=numerics, placement=placement)))
        return cls(spec=spec, dtype=numerics.dtype, graph=graph, state=state, layers_apart=placement.layers_apart)

    def params(self) -> dict[str, ParamInfo]:
        """Every parameter by its path: shape, dtype and logical axes."""
        infos = {}
        for path, variable in nnx.to_flat_state(self.state):
            value, metadata = variable.get_value(), variable.get_metadata()
            axes = metadata["axes"]
            order, turned = metadata["order"], metadata["turned"]
            if path[0] == STACK:
                axes, order, turned = (STACK, *axes), _stacked(order), _stacked(turned)
            infos[_join(path)] = ParamInfo(
                shape=tuple(value.shape),
                dtype=jnp.dtype(value.dtype),
                axes=axes,
                order=order,
                turned=turned,
            )
        return infos

    def bind(self, params: Mapping[str, Held]) -> Decoder:
        """The decoder with its parameters, by path as in `params()`; call it inside the jitted function."""
        flat = [(path, variable.replace(params[_join(path)])) for path, variable in nnx.to_flat_state(self.state)]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def _stacked(dims: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """An order of a layer's dimensions as one of the stack's, whose first is the layer."""
    return None if dims is None else (0, *(dim + 1 for dim in dims))


def _join(path: tuple[object, ...]) -> str:
    """`('layers', 'attn', 'qkv', 'kernel')` -> `layers.attn.qkv.kernel`."""
    return ".".join(str(part) for part in path)


def abstract_params(
    spec: ModelSpec, *, dtype: jnp.dtype, quantization: str | None = None, kv_repeat: int = 1
) -> dict[str, ParamInfo]:
    """The parameters that a decoder of this spec needs.

    Args:
        spec: The model.
        dtype: Dtype of what is not quantised.
        quantization: "int8" or None.
        kv_repeat: See `sharding.rules.kv_repeat`.
    """
    return Blueprint.of(spec, dtype=dtype, quantization=quantization, kv_repeat=kv_repeat).params()
