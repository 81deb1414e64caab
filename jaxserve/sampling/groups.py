"""The vocabulary in groups of neighbouring tokens, a register's width each.

What is best, or drawn, is found in two small steps: the group, then the token within it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

GROUP = 128
"""Tokens of a group; fixed, for the noise of a draw depends on it."""


def grouped(x: Float[Array, "S V"], fill: float) -> Float[Array, "S groups group"]:
    """Cuts each row into groups, the last one filled up.

    Args:
        x: [S, V].
        fill: What stands where there is no token.
    """
    num_rows, vocab_size = x.shape
    missing = -vocab_size % GROUP
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
    return x.reshape(num_rows, -1, GROUP)


def take_group(groups: Float[Array, "S groups group"], group: Int32[Array, " S"]) -> Float[Array, "S group"]:
    """One group of each row.

    Args:
        groups: From `grouped`.
        group: [S]; which.
    """
    return jnp.take_along_axis(groups, group[:, None, None], axis=1, mode="clip")[:, 0]
