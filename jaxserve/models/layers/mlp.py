"""The gated feed-forward block (SwiGLU and its kin, arXiv:2002.05202)."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.models.layers.linear import Linear, Numerics
from jaxserve.models.spec import Activation, ModelSpec


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), gate and up in one matmul."""

    def __init__(self, spec: ModelSpec, *, numerics: Numerics) -> None:
        model, ffn = {"embed": spec.hidden_size}, {"ffn": spec.ffn_size}
        self.gate_up = Linear(model, {"gate_up": 2, **ffn}, bias=spec.mlp_bias, numerics=numerics)
        self.down = Linear(ffn, model, bias=spec.mlp_bias, numerics=numerics)
        self.activation = spec.activation

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Maps each token on its own."""
        gate_up = self.gate_up(x)
        return self.down(activate(gate_up[:, 0], self.activation) * gate_up[:, 1])


def activate(x: Float[Array, "T F"], activation: Activation) -> Float[Array, "T F"]:
    """The gate's non-linearity."""
    match activation:
        case Activation.SILU:
            return jax.nn.silu(x)
        case Activation.GELU_TANH:
            return jax.nn.gelu(x, approximate=True)
