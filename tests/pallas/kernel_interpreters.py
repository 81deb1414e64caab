"""Runs an op's backends wherever the tests run: kernels for accelerators on their device, or in their interpreter.

The TPU interpreter simulates DMAs and semaphores with a race detector on: what one DMA writes may be read only after
its semaphore has been waited for. Memory that a kernel has not written holds NaN (or the largest integer).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas.dispatch import Backend, Target

GPU_INTERPRETER = vars(plgpu).get("force_gpu_interpret_mode")
"""JAX has one since 0.12."""


@dataclass(frozen=True)
class Runner:
    """How a backend runs here.

    Attributes:
        backend: The backend.
    """

    backend: Backend

    @property
    def is_interpreted(self) -> bool:
        return self.backend in (Backend.TPU, Backend.GPU) and self.backend.value != jax.default_backend()

    @property
    def target(self) -> Target:
        """To be passed to the op: kernels are told that they are on their device, whose interpreter `traced` forces."""
        return Target(platform=self.backend.value if self.is_interpreted else None, backend=self.backend)

    def traced(self) -> AbstractContextManager[object]:
        """The op must be traced inside."""
        if not self.is_interpreted:
            return contextlib.nullcontext()
        if self.backend is Backend.TPU:
            return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
        assert GPU_INTERPRETER is not None
        return GPU_INTERPRETER(vars(plgpu)["InterpretGPUParams"](detect_races=True))

    def __str__(self) -> str:
        return self.backend.value


PLAIN = (Runner(Backend.REFERENCE), Runner(Backend.XLA))

TPU = Runner(Backend.TPU)

GPU = pytest.param(
    Runner(Backend.GPU),
    marks=pytest.mark.skipif(
        jax.default_backend() != "gpu" and GPU_INTERPRETER is None, reason="no GPU, and this JAX has no interpreter"
    ),
    id="gpu",
)


@contextlib.contextmanager
def races_fail() -> Iterator[None]:
    """Fails if a kernel that ran inside had a data race; results must be waited for inside.

    Since JAX 0.12 a race raises by itself; before, it is printed.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    assert "RACE" not in printed.getvalue(), printed.getvalue()
