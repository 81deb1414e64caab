"""Runs an op's backends wherever the tests run: kernels for accelerators on their device, or in their interpreter.

The TPU interpreter simulates DMAs and semaphores with a race detector on: what one DMA writes may be read only after
its semaphore has been waited for. Memory that a kernel has not written holds NaN (or the largest integer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from unittest import mock

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas.dispatch import Backend, Target
from jaxserve.pallas.paged_attention.gpu import decode, prefill
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import PrefillShape, PrefillTiles, prefill_tiles
from jaxserve.pallas.paged_attention.gpu.tiles import DecodeShape, DecodeTiles, decode_tiles
from jaxserve.pallas.paged_attention.tpu import op as tpu_op
from jaxserve.pallas.paged_attention.tpu import prefill as tpu_prefill
from jaxserve.pallas.paged_attention.tpu.decode_tiles import DecodeTiles as TpuDecodeTiles
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import LANES, SUBLANES, Core, Sizes
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import PrefillTiles as TpuPrefillTiles

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
        return _tpu_interpreter() if self.backend is Backend.TPU else _gpu_interpreter()

    def __str__(self) -> str:
        return self.backend.value


@contextlib.contextmanager
def _tpu_interpreter() -> Iterator[None]:
    """Mosaic's interpreter, with attention's tiles so small that a few pages of context make several of each."""
    with (
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)),
        mock.patch.object(tpu_op, "choose_decode_tiles", small_decode_tiles),
        mock.patch.object(tpu_prefill, "choose_tiles", small_prefill_tiles),
    ):
        yield


def small_decode_tiles(sizes: Sizes, _: Core) -> TpuDecodeTiles:
    """Two items an iteration, of as few tokens as fill whole registers."""
    tokens = math.lcm(sizes.page_size, max(LANES // sizes.num_kv_heads, SUBLANES))
    return TpuDecodeTiles(pages=tokens // sizes.page_size, items=2)


def small_prefill_tiles(sizes: Sizes, _: Core) -> TpuPrefillTiles:
    """The least of everything."""
    return TpuPrefillTiles(
        query_tokens=16,
        block_tokens=16,
        pages=math.lcm(sizes.page_size, LANES) // sizes.page_size,
        unroll=2,
        sum_by_matmul=sizes.lanes == LANES,
    )


@contextlib.contextmanager
def _gpu_interpreter() -> Iterator[None]:
    """Mosaic GPU's interpreter, with attention's tiles chosen so that it can run them and soon comes round a ring."""
    assert GPU_INTERPRETER is not None
    with (
        GPU_INTERPRETER(vars(plgpu)["InterpretGPUParams"](detect_races=True)),
        mock.patch.object(decode, "decode_tiles", interpretable_decode_tiles),
        mock.patch.object(prefill, "prefill_tiles", interpretable_prefill_tiles),
        _compiled_quickly(),
    ):
        yield


@contextlib.contextmanager
def _compiled_quickly() -> Iterator[None]:
    """Programs that call the interpreter run once: compiling them would take half of a test's time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def interpretable_decode_tiles(shape: DecodeShape, *, num_blocks: int = 1) -> DecodeTiles:
    """Short splits, so that there is something to combine, for one thread block with short rings."""
    chosen = decode_tiles(shape)
    entries = min(chosen.entries, 4)
    return dataclasses.replace(
        chosen, split_tokens=64, num_blocks=min(num_blocks, 1), entries=entries, interpretable=True
    )


def interpretable_prefill_tiles(shape: PrefillShape, *, num_blocks: int = 2) -> PrefillTiles:
    """Two thread blocks, so that each has several items, with short rings."""
    chosen = prefill_tiles(shape, interpretable=True)
    stages, narrow = min(chosen.stages, 2), min(chosen.narrow_entries, 3)
    return dataclasses.replace(chosen, num_blocks=min(num_blocks, 2), stages=stages, narrow_entries=narrow)


PLAIN = (Runner(Backend.REFERENCE), Runner(Backend.XLA))

TPU = Runner(Backend.TPU)

GPU = pytest.param(
    Runner(Backend.GPU),
    marks=[
        pytest.mark.skipif(
            jax.default_backend() != "gpu" and GPU_INTERPRETER is None, reason="no GPU, and this JAX has no interpreter"
        ),
        # What is not visible may be NaN, which numpy's matmul notices inside the interpreter.
        pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
    ],
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
