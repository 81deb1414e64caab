"""What JAX runs on where nobody has said: not on a TPU that is not there.

The command line says so in the environment before JAX is imported; a library leaves its caller's environment alone and
sets JAX's own option, which works for as long as JAX has not been asked for its devices.
"""

from __future__ import annotations

import jax

from jaxserve.core.environment import tpu_is_absent


def settle_platform() -> None:
    """Keeps JAX from starting a TPU where only libtpu is, unless the caller has chosen a platform."""
    if tpu_is_absent() and jax.config.values["jax_platforms"] is None:
        jax.config.update("jax_platforms", "cpu")
