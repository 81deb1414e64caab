"""Linear maps with named axes, in floating point or int8.

A kernel keeps the dimensions the model thinks in (`[D, K, G+2, H]` rather than `[D, O]`), each with its logical axis,
so that the loader, the sharding rules and the quantiser all read one declaration. It is never flattened: a dimension
merged with one that a mesh splits could no longer be split, and the weight would be gathered instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.quant.bits import from_storage
from jaxserve.quant.qtensor import contract, int8_matmul


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """In which numbers a model is served.

    Attributes:
        dtype: Activations, and weights that are not quantised.
        quantization: "int8" for per-channel int8 weights with int8 activations, or None.
        inputs_last: Whether kernels are held with the contracted dimensions last, as CPUs read them fastest.
    """

    dtype: jnp.dtype
    quantization: str | None
    inputs_last: bool = False


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
    *,
    order: tuple[int, ...] | None = None,
    turned: tuple[int, ...] | None = None,
) -> nnx.Param[Array]:
    """Declares a parameter; models are only ever built abstractly, so the zeros never exist.

    Args:
        shape: Its shape.
        axes: Its logical axes.
        dtype: Its dtype.
        order: Its dimensions from major to minor as a matrix unit wants them in memory; None if any order does.
        turned: Its dimensions in the order in which it is held while the model runs; None if as declared.
    """
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes, order=order, turned=turned)


class Linear(nnx.Module):
    """y = x @ kernel + bias over any number of input and output dimensions.

    Args:
        inputs: Logical axis -> size of the contracted dimensions, in order.
        outputs: The same for the dimensions that appear.
        bias: Whether a bias is added.
        numerics: Dtype and quantisation.
    """

    def __init__(
        self, inputs: Mapping[str, int], outputs: Mapping[str, int], *, bias: bool, numerics: Numerics
    ) -> None:
        in_shape, out_shape = tuple(inputs.values()), tuple(outputs.values())
        in_axes, out_axes = tuple(inputs), tuple(outputs)
        quantized = numerics.quantization == "int8"
        dtype = jnp.dtype(jnp.int8) if quantized else numerics.dtype
        ins, outs = range(len(in_shape)), range(len(in_shape), len(in_shape) + len(out_shape))
        # Tiles of a matrix unit want the last input beside the last output.
        order = (*outs[:-1], *ins, outs[-1])
        turned = (*outs, *ins) if numerics.inputs_last else None
        self.kernel = param(in_shape + out_shape, in_axes + out_axes, dtype, order=order, turned=turned)
        self.inputs_last = numerics.inputs_last
        self.scale = param(out_shape, out_axes, jnp.dtype(jnp.float32)) if quantized else None
        self.bias = param(out_shape, out_axes, numerics.dtype) if bias else None

    def __call__(self, x: Float[Array, "T *inputs"]) -> Float[Array, "T *outputs"]:
        """Maps each row; the product is accumulated in float32 (int32 if quantised) and returned in x's dtype."""
        kernel = from_storage(self.kernel[...])
        if self.scale is not None:
            y = int8_matmul(x, kernel, self.scale[...], inputs_last=self.inputs_last)
        else:
            y = contract(x, kernel, jnp.dtype(jnp.float32), inputs_last=self.inputs_last)
        if self.bias is not None:
            y = y + from_storage(self.bias[...])[None].astype(jnp.float32)
        return y.astype(x.dtype)


class Table(nnx.Module):
    """A row a token: looked up for an embedding, multiplied for logits.

    Args:
        vocab_size: V.
        hidden_size: D.
        numerics: Dtype and quantisation.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, numerics: Numerics) -> None:
        quantized = numerics.quantization == "int8"
        dtype = jnp.dtype(jnp.int8) if quantized else numerics.dtype
        # In rows, as they are looked up; left to itself a TPU turns a table of few columns round, and back every step.
        self.table = param((vocab_size, hidden_size), ("vocab", "embed"), dtype, order=(0, 1))
        self.scale = param((vocab_size,), ("vocab",), jnp.dtype(jnp.float32)) if quantized else None
        self.dtype = numerics.dtype

    def rows(self, token_ids: Array) -> Float[Array, "T D"]:
        """Embeddings of tokens, in the model's dtype; ids out of range give the nearest row."""
        rows = from_storage(self.table[...].at[token_ids].get(mode="clip"))
        if self.scale is not None:
            rows = rows.astype(jnp.float32) * self.scale[...].at[token_ids].get(mode="clip")[:, None]
        return rows.astype(self.dtype)

    def logits(self, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """`x @ table.T` in float32."""
        if self.scale is not None:
            return int8_matmul(x, self.table[...], self.scale[...], inputs_last=True)
        return contract(x, from_storage(self.table[...]), jnp.dtype(jnp.float32), inputs_last=True)
