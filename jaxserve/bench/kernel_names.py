"""What the attention kernels that are compared are called, and what they can do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OURS = "jaxserve"
XLA = "jaxserve xla"
JAX_RAGGED = "jax ragged"
JAX_PAGED = "jax paged"
JAX_FLASH = "jax flash"
CUDNN = "cudnn flash"
TORCH_SDPA = "torch sdpa"
TORCH_FLASH = "torch flash"

STATIC = (OURS, JAX_RAGGED, JAX_PAGED)
"""Kernels whose schedules are read."""

TIMED = (OURS, XLA, JAX_RAGGED, JAX_PAGED, JAX_FLASH, CUDNN, TORCH_SDPA, TORCH_FLASH)
"""Kernels that are timed where there is a device for them."""

ARRAY_SIZE: Mapping[str, int] = MappingProxyType({"v4": 128, "v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256})
"""Rows, and columns, of a matrix unit."""

DECODES_ONLY = frozenset({JAX_PAGED})
PROMPTS_ONLY = frozenset({JAX_FLASH, CUDNN})
