"""What every Mosaic GPU kernel here needs: a Hopper GPU, whose TMA and wgmma they are written for."""

from __future__ import annotations

import jax

COMPUTE_CAPABILITY = "9.0"
"""H100, H200, GH200."""


def require_hopper() -> None:
    """Refuses GPUs that are there and are not Hopper's; without any, the program is for another machine.

    Raises:
        NotImplementedError: This machine's GPU is another one; the next backend takes over.
    """
    if jax.default_backend() != "gpu":
        return
    found = str(jax.local_devices()[0].compute_capability)
    if found != COMPUTE_CAPABILITY:
        raise NotImplementedError(f"the kernel needs compute capability {COMPUTE_CAPABILITY}, not {found}")
