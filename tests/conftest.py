"""Test-wide settings: the CPU with eight virtual devices, strict dtypes and ranks, shapes checked at run time."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
for name in [name for name in os.environ if name.startswith("JAXSERVE_") and name != "JAXSERVE_CACHE"]:
    del os.environ[name]

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Modules of array functions whose annotations are checked; host code has mypy. `paged_attention/api` checks by itself,
# with errors that its tests look at.
ARRAY_MODULES = [
    *("jaxserve.models.decoder", "jaxserve.models.layers", "jaxserve.quant", "jaxserve.kv.pool"),
    *(f"jaxserve.pallas.paged_attention.{name}" for name in ("reference", "xla", "cache")),
    *(f"jaxserve.pallas.page_copy.{name}" for name in ("reference", "xla")),
    *(f"jaxserve.sampling.{name}" for name in ("filters", "logits", "logprobs", "sampler", "state")),
    *("jaxserve.engine.batch", "jaxserve.engine.programs"),
]
install_import_hook(ARRAY_MODULES, "shape_checker.check")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shared machines are slow at times; a deadline would fail tests for it.
settings.register_profile("jaxserve", deadline=None, print_blob=True)
settings.load_profile("jaxserve")


@pytest.fixture(scope="session")
def cache_dir() -> object:
    """Where downloaded models are kept between runs."""
    from jaxserve.core.environment import cache_dir

    return cache_dir()
