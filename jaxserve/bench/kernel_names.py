"""What the attention kernels that are compared are called, and what they can do."""

from __future__ import annotations

OURS = "jaxserve"
XLA = "jaxserve xla"
JAX_RAGGED = "jax ragged"
JAX_PAGED = "jax paged"
JAX_FLASH = "jax flash"
CUDNN = "cudnn flash"

STATIC = (OURS, JAX_RAGGED, JAX_PAGED)
"""Kernels whose schedules are read."""

TIMED = (OURS, XLA, JAX_RAGGED, JAX_PAGED, JAX_FLASH, CUDNN)
"""Kernels that are timed where there is a device for them."""

DECODES_ONLY = frozenset({JAX_PAGED})
PROMPTS_ONLY = frozenset({JAX_FLASH, CUDNN})
