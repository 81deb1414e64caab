"""Attention kernels timed on this machine's device, beside what its memory and matrix units reach in the same run.

A call's state is its arguments; the output is the next call's queries, so calls follow one another, and pools take
turns, so that no cache keeps one. A decode is set against the measured bandwidth of a copy (bytes read and written), a
prompt against the measured rate of a matmul.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.table import Table

from jaxserve.bench.device_timer import copy_bandwidth, matmul_rate, time_on_device
from jaxserve.bench.kernel_names import CUDNN, DECODES_ONLY, JAX_FLASH, JAX_PAGED, JAX_RAGGED, OURS, PROMPTS_ONLY, XLA
from jaxserve.bench.kernel_programs import jax_paged, jax_ragged, split_pool
from jaxserve.bench.kernels import Failure
from jaxserve.bench.tiled_kernels import tiled_kernel
from jaxserve.bench.torch_clock import Seconds, torch_kernels
from jaxserve.bench.tuner import Score
from jaxserve.core.errors import ConfigError
from jaxserve.pallas.dispatch import Backend, Target
from jaxserve.pallas.paged_attention.api import paged_attention, prepared
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.pallas.tuning import Tiles
from jaxserve.sharding.chips import Chip, chip_named

TPU_KINDS: Mapping[str, str] = MappingProxyType(
    {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
)
"""What JAX calls chips."""

ROTATED_BYTES = 1 << 30
"""Keys and values that calls go through before one comes round again: far more than a cache holds."""

MAX_STATES = 8
TIMED_S = 0.04
"""How long the timed calls take if the kernel is as fast as the device; other kernels make a tenth as many calls."""

TUNED_ROUNDS = 10
"""Calls on each state that are timed for a choice of tiles."""

_LOGGER = logging.getLogger(__name__)

State: TypeAlias = tuple[Array, ...]
Step: TypeAlias = Callable[[State], State]
Make: TypeAlias = Callable[[AttentionShape, int], tuple[Step, list[State]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the device reaches.

    Attributes:
        device: What it is called.
        copy_bytes_per_s: Of a copy, read and written ones counted.
        matmul_flops_per_s: Of a large bfloat16 matmul.
    """

    device: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float

    @classmethod
    def measure(cls) -> Ceilings:
        """Measures them."""
        kind = jax.devices()[0].device_kind
        return cls(device=kind, copy_bytes_per_s=copy_bandwidth(), matmul_flops_per_s=matmul_rate())


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockReport:
    """A kernel's time.

    Attributes:
        kernel: Its name.
        shape: Name of the problem.
        seconds: Of a call.
        bytes_per_s: Of keys and values read.
        flops_per_s: Of operations that count.
        fraction: Of the ceiling: the copy's bandwidth for a decode, the matmul's rate for a prompt.
    """

    kernel: str
    shape: str
    seconds: float
    bytes_per_s: float
    flops_per_s: float
    fraction: float

    def as_json(self) -> dict[str, object]:
        """All figures."""
        return asdict(self)


def clock_kernels(
    shapes: Mapping[str, AttentionShape],
    kernels: Sequence[str] | None,
    ceilings: Ceilings,
    progress: Callable[[str, int, int], None],
) -> list[ClockReport | Failure]:
    """Times every kernel that this platform has on every problem; one that fails is reported as such.

    Args:
        shapes: Problems by name.
        kernels: Only these; None takes all.
        ceilings: Of this device.
        progress: Told what is being done, how much is done, and how much there is.
    """
    what = f"Timing on {ceilings.device}"
    platform = jax.default_backend()
    timers = {name: _by_jax(make) for name, make in available(platform).items()}
    if platform == "gpu":
        timers.update(torch_kernels())
    cases = [
        (name, kernel, timer)
        for name, shape in shapes.items()
        for kernel, timer in timers.items()
        if (not kernels or kernel in kernels) and kernel not in (PROMPTS_ONLY if shape.is_decode else DECODES_ONLY)
    ]
    reports: list[ClockReport | Failure] = []
    progress(what, 0, len(cases))
    for name, kernel, timer in cases:
        reports.append(_clock(kernel, name, shapes[name], timer, ceilings))
        progress(what, len(reports), len(cases))
    return reports


def _by_jax(make: Make) -> Seconds:
    def seconds(shape: AttentionShape, num_states: int, rounds: int) -> float:
        step, states = make(shape, num_states)
        return time_on_device(step, states, rounds)

    return seconds


def _clock(kernel: str, name: str, shape: AttentionShape, timer: Seconds, ceilings: Ceilings) -> ClockReport | Failure:
    ideal_s = max(shape.kv_bytes / ceilings.copy_bytes_per_s, shape.flops / ceilings.matmul_flops_per_s)
    num_states = max(2, min(MAX_STATES, math.ceil(ROTATED_BYTES / shape.kv_bytes)))
    num_calls = TIMED_S / ideal_s * (1.0 if kernel == OURS else 0.1)
    try:
        seconds = timer(shape, num_states, max(2, round(num_calls / num_states)))
    except Exception as error:  # a kernel that does not compile or run here is a result, not the end of the run
        return Failure(kernel=kernel, shape=name, reason=f"{type(error).__name__}: {error}".splitlines()[0][:300])
    rates = shape.kv_bytes / seconds, shape.flops / seconds
    fraction = rates[0] / ceilings.copy_bytes_per_s if shape.is_decode else rates[1] / ceilings.matmul_flops_per_s
    return ClockReport(
        kernel=kernel, shape=name, seconds=seconds, bytes_per_s=rates[0], flops_per_s=rates[1], fraction=fraction
    )


def available(platform: str) -> dict[str, Make]:
    """The kernels of a platform: ours, plain JAX, and the peers there.

    Raises:
        ConfigError: The platform has no kernels.
    """
    if platform == "gpu":
        own = {OURS: _own(Backend.GPU), XLA: _own(Backend.XLA)}
        return {**own, JAX_PAGED: _jax_paged_gpu, JAX_FLASH: _jax_flash, CUDNN: _cudnn}
    if platform == "tpu":
        return {OURS: _own(Backend.TPU), XLA: _own(Backend.XLA), JAX_RAGGED: _jax_ragged, JAX_PAGED: _jax_paged_tpu}
    raise ConfigError("There is no TPU or GPU here to time kernels on; --topology v6e:2x4 reads their schedules.")


def tpu_here() -> Chip:
    """This machine's TPU.

    Raises:
        ConfigError: There is none.
    """
    kind = jax.devices()[0].device_kind
    if kind not in TPU_KINDS:
        raise ConfigError("There is no TPU here to time tiles on; --topology v6e:1x1 reads their schedules.")
    return chip_named(TPU_KINDS[kind])


def _own(backend: Backend) -> Make:
    def make(shape: AttentionShape, num_states: int) -> tuple[Step, list[State]]:
        batch, layer = jax.tree.map(jnp.asarray, (shape.batch(np.random.default_rng(0)), shape.layer()))
        target = Target(backend=backend)
        # As in a model, whose layers share what is made once a step.
        batch = prepared(batch, group=shape.num_heads // shape.num_kv_heads, target=target)

        def step(state: State) -> State:
            q, k, v, pool = state
            out, pool = paged_attention(q, k, v, pool, batch, layer, config=shape.config, target=target)
            return out, k, v, pool

        structs = shape.abstract_arrays()
        return step, [_normal(structs, key) for key in _keys(num_states)]

    return make


def clock_tiles(name: str, shape: AttentionShape, tiles: Tiles) -> Score | None:
    """A `tuner.Scorer` that times the kernel with these tiles on this machine's TPU.

    Args:
        name: The problem's.
        shape: The problem.
        tiles: Of the kernel that it goes to.
    """
    kernel = tiled_kernel(shape)
    cut = kernel.tiles(**tiles)
    batch, layer = jax.tree.map(jnp.asarray, (shape.batch(np.random.default_rng(0)), shape.layer()))

    def step(state: State) -> State:
        q, new, pool, out = state
        out, pool = kernel.run(q, new, pool, out, batch, layer, config=shape.config, tiles=cut)
        return out, new, pool, q

    arrays = shape.abstract_arrays()
    q, pool = arrays["q"], arrays["kv_pages"]
    structs = {"q": q, "new": jax.ShapeDtypeStruct((q.shape[0], *pool.shape[2:]), pool.dtype), "pool": pool, "out": q}
    num_states = max(2, min(MAX_STATES, math.ceil(ROTATED_BYTES / shape.kv_bytes)))
    started = time.monotonic()
    try:
        states = [_normal(structs, key) for key in _keys(num_states)]
        seconds = time_on_device(step, states, TUNED_ROUNDS)
    except Exception as error:  # tiles that do not compile or run here are a result, not the end of the run
        _LOGGER.info("%s, %s: %s", name, tiles, f"{error}".splitlines()[0][:300])
        return None
    return Score(cost=seconds, bundles=0, compile_s=time.monotonic() - started)


def _jax_ragged(shape: AttentionShape, num_states: int) -> tuple[Step, list[State]]:
    function, _, _ = jax_ragged(shape, tpu_here())
    batch = jax.tree.map(jnp.asarray, shape.batch(np.random.default_rng(0)))
    structs = {name: each for name, each in shape.abstract_arrays().items() if name in ("q", "kv_pages")}
    return lambda state: (function(state[0], state[1], batch), state[1]), [
        _normal(structs, key) for key in _keys(num_states)
    ]


def _jax_paged_tpu(shape: AttentionShape, num_states: int) -> tuple[Step, list[State]]:
    function, _ = jax_paged(shape)
    batch = jax.tree.map(jnp.asarray, shape.batch(np.random.default_rng(0)))
    return lambda state: (function(*state, batch), *state[1:]), _split_states(shape, num_states)


def _jax_paged_gpu(shape: AttentionShape, num_states: int) -> tuple[Step, list[State]]:
    """`jax.experimental.pallas.ops.gpu.paged_attention`, which Pallas lowers through Triton."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as kernel

    batch = jax.tree.map(jnp.asarray, shape.batch(np.random.default_rng(0)))
    scale = jnp.asarray(shape.config.scale, shape.dtype)

    def step(state: State) -> State:
        q, keys, values = state
        return kernel(q * scale, keys, values, batch.page_table, batch.context_lens), keys, values

    return step, _split_states(shape, num_states)


def _jax_flash(shape: AttentionShape, num_states: int) -> tuple[Step, list[State]]:
    """`jax.experimental.pallas.ops.gpu.attention_mgpu`: Hopper, keys and values contiguous, no pages."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as kernel

    tiles = kernel.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    scale = jnp.asarray(shape.config.scale, shape.dtype)

    def step(state: State) -> State:
        q, k, v = state
        return kernel.attention(q * scale, k, v, tiles), k, v

    return step, _dense_states(shape, num_states)


def _cudnn(shape: AttentionShape, num_states: int) -> tuple[Step, list[State]]:
    """CuDNN's flash attention, keys and values contiguous, no pages."""

    def step(state: State) -> State:
        q, k, v = state
        out = jax.nn.dot_product_attention(q, k, v, scale=shape.config.scale, is_causal=True, implementation="cudnn")
        return out, k, v

    return step, _dense_states(shape, num_states)


def _split_states(shape: AttentionShape, num_states: int) -> list[State]:
    pool = jax.ShapeDtypeStruct(split_pool(shape, 1), jnp.dtype(shape.kv_dtype))
    structs = {"q": shape.abstract_arrays()["q"], "keys": pool, "values": pool}
    return [_normal(structs, key) for key in _keys(num_states)]


def _dense_states(shape: AttentionShape, num_states: int) -> list[State]:
    if set(shape.sequences) != {(shape.context, shape.context)}:
        raise NotImplementedError("it takes whole prompts of one length")
    structs = {name: each for name, each in shape.abstract_arrays().items() if name != "kv_pages"}
    apart = {
        name: jax.ShapeDtypeStruct((shape.num_seqs, shape.query_tokens, *each.shape[1:]), each.dtype)
        for name, each in structs.items()
    }
    return [_normal(apart, key) for key in _keys(num_states)]


def _normal(structs: Mapping[str, jax.ShapeDtypeStruct], key: Array) -> State:
    """Random numbers, made on the device."""
    keys = jax.random.split(key, len(structs))
    return tuple(
        jax.jit(jax.random.normal, static_argnums=(1, 2))(each, struct.shape, struct.dtype)
        for each, struct in zip(keys, structs.values(), strict=True)
    )


def _keys(count: int) -> Iterator[Array]:
    return iter(jax.random.split(jax.random.key(0), count))


def table(ceilings: Ceilings, reports: Sequence[ClockReport | Failure]) -> Table:
    """A line a kernel and problem."""
    title = (
        f"{ceilings.device}: copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, "
        f"matmul {ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
    )
    grid = Table(title=title, title_justify="left")
    grid.add_column("problem")
    grid.add_column("kernel")
    for name in ("us", "GB/s", "TFLOP/s", "of ceiling"):
        grid.add_column(name, justify="right")
    for report in reports:
        if isinstance(report, Failure):
            grid.add_row(report.shape, report.kernel, *["-"] * 4)
            continue
        grid.add_row(
            report.shape,
            report.kernel,
            f"{report.seconds * 1e6:.1f}",
            f"{report.bytes_per_s / 1e9:.0f}",
            f"{report.flops_per_s / 1e12:.1f}",
            f"{report.fraction:.2f}",
        )
    return grid
