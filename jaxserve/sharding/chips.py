"""What accelerators can do: the published figures that memory plans and time estimates divide by.

A figure is for one JAX device: a chip, except on TPU v7x, whose chips are two devices each; links are a chip's. Peaks
are dense.

Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x: "System architecture"), which give the interconnect of a
chip both ways and all links together; arXiv:2304.01433 for v4's six links of 50 GB/s; jax-ml.github.io/scaling-book
("How to Think About TPUs": which axes close to rings; "Sharded Matrices": about a microsecond a hop); NVIDIA's H100 and
H200 data sheets (SXM), and arXiv:2507.04786 for a microsecond between GPUs. The largest slices are pods in the same TPU
documents, of v5p the 96 cubes of 64 chips that one job can have, and of GPUs the eight of an HGX board.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxserve.core.environment import GPU_MEMORY_SHARE
from jaxserve.core.errors import ConfigError

GIB = 1 << 30
KIB = 1 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """What connects chips of a kind.

    Attributes:
        num_axes: Axes of the grid in which each chip is wired to its neighbours; 0 if switches connect them.
        bytes_per_s: One way over one link of a grid, or over all links to the switches.
        die_bytes_per_s: One way between the devices of a chip, 0 if it is one.
        hop_s: Time until a message has come over a link or through a switch.
    """

    num_axes: int
    bytes_per_s: float
    die_bytes_per_s: float
    hop_s: float


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a kind.

    Attributes:
        name: As topologies call it.
        title: As its maker calls it.
        device_kind: As JAX calls it, which takes the name from the driver.
        platform: JAX's name of its kind, "tpu" or "gpu".
        hbm_bytes: Memory.
        hbm_bytes_per_s: Its bandwidth.
        flops_per_s: Dense operations a second, by number format of the operands.
        links: What connects it with others.
        fast_bytes: VMEM of a TensorCore, or shared memory a block can have.
        cores: TensorCores or streaming multiprocessors.
        devices_per_chip: JAX devices a chip is.
        gke_accelerator: Value of the node selector `cloud.google.com/gke-tpu-accelerator`, None off GKE's TPUs.
        slice_type: What the TPU runtime calls a slice, with {} for the number it counts (cores or chips).
        counted_per_chip: What the slice type counts in a chip.
        max_chips: Chips of the largest slice.
    """

    name: str
    title: str
    device_kind: str
    platform: str
    hbm_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    links: Links
    fast_bytes: int
    cores: int
    devices_per_chip: int
    gke_accelerator: str | None
    slice_type: str
    counted_per_chip: int
    max_chips: int

    @property
    def serving_bytes(self) -> int:
        """Memory that JAX finds when it serves: of a GPU's the share that it is told to take."""
        return int(self.hbm_bytes * (GPU_MEMORY_SHARE if self.platform == "gpu" else 1))

    def peak_flops(self, number_format: str) -> float:
        """Operations a second with operands of a number format; of bfloat16 where it has no unit of its own."""
        return self.flops_per_s.get(number_format, self.flops_per_s["bfloat16"])


def _flops(
    bfloat16: float, *, int8: float | None = None, fp8: float | None = None, float32: float
) -> Mapping[str, float]:
    rates = {"bfloat16": bfloat16, "float16": bfloat16, "float32": float32}
    if int8 is not None:
        rates["int8"] = int8
    if fp8 is not None:
        rates["float8_e4m3fn"] = rates["float8_e5m2"] = fp8
    return MappingProxyType(rates)


def _grid(num_axes: int, bytes_per_s: float, *, die_bytes_per_s: float = 0.0) -> Links:
    return Links(num_axes=num_axes, bytes_per_s=bytes_per_s, die_bytes_per_s=die_bytes_per_s, hop_s=1e-6)


# 18 links of 25 GB/s each way.
_NVLINK4 = Links(num_axes=0, bytes_per_s=450e9, die_bytes_per_s=0.0, hop_s=1e-6)

# float32 is multiplied as such: by a TPU's matrix unit in six bfloat16 passes, on Hopper without tensor cores.
_CHIPS = (
    Chip(
        name="v4",
        title="TPU v4",
        device_kind="TPU v4",
        platform="tpu",
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=1228e9,
        flops_per_s=_flops(275e12, int8=275e12, float32=275e12 / 6),
        links=_grid(3, 50e9),
        fast_bytes=16 << 20,
        cores=2,
        devices_per_chip=1,
        gke_accelerator="tpu-v4-podslice",
        slice_type="v4-{}",
        counted_per_chip=2,
        max_chips=4096,
    ),
    Chip(
        name="v5e",
        title="TPU v5e",
        device_kind="TPU v5 lite",
        platform="tpu",
        hbm_bytes=16 * GIB,
        hbm_bytes_per_s=820e9,
        flops_per_s=_flops(197e12, int8=394e12, float32=197e12 / 6),
        links=_grid(2, 50e9),
        fast_bytes=128 << 20,
        cores=1,
        devices_per_chip=1,
        gke_accelerator="tpu-v5-lite-podslice",
        slice_type="v5litepod-{}",
        counted_per_chip=1,
        max_chips=256,
    ),
    Chip(
        name="v5p",
        title="TPU v5p",
        device_kind="TPU v5",
        platform="tpu",
        hbm_bytes=95 * GIB,
        hbm_bytes_per_s=2765e9,
        flops_per_s=_flops(459e12, int8=918e12, float32=459e12 / 6),
        links=_grid(3, 100e9),
        fast_bytes=64 << 20,
        cores=2,
        devices_per_chip=1,
        gke_accelerator="tpu-v5p-slice",
        slice_type="v5p-{}",
        counted_per_chip=2,
        max_chips=6144,
    ),
    Chip(
        name="v6e",
        title="TPU v6e (Trillium)",
        device_kind="TPU v6 lite",
        platform="tpu",
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=1640e9,
        flops_per_s=_flops(918e12, int8=1836e12, float32=918e12 / 6),
        links=_grid(2, 100e9),
        fast_bytes=128 << 20,
        cores=1,
        devices_per_chip=1,
        gke_accelerator="tpu-v6e-slice",
        slice_type="v6e-{}",
        counted_per_chip=1,
        max_chips=256,
    ),
    Chip(
        name="tpu7x",
        title="TPU v7x (Ironwood)",
        device_kind="TPU7x",
        platform="tpu",
        hbm_bytes=96 * GIB,
        hbm_bytes_per_s=3690e9,
        flops_per_s=_flops(1153e12, fp8=2307e12, float32=1153e12 / 6),
        links=_grid(3, 100e9, die_bytes_per_s=600e9),
        fast_bytes=64 << 20,
        cores=1,
        devices_per_chip=2,
        gke_accelerator="tpu7x",
        slice_type="tpu7x-{}",
        counted_per_chip=2,
        max_chips=9216,
    ),
    Chip(
        name="h100",
        title="NVIDIA H100 SXM",
        device_kind="NVIDIA H100 80GB HBM3",
        platform="gpu",
        hbm_bytes=80 * 10**9,
        hbm_bytes_per_s=3350e9,
        flops_per_s=_flops(989e12, int8=1979e12, fp8=1979e12, float32=67e12),
        links=_NVLINK4,
        fast_bytes=227 * KIB,
        cores=132,
        devices_per_chip=1,
        gke_accelerator=None,
        slice_type="",
        counted_per_chip=1,
        max_chips=8,
    ),
    Chip(
        name="h200",
        title="NVIDIA H200 SXM",
        device_kind="NVIDIA H200",
        platform="gpu",
        hbm_bytes=141 * 10**9,
        hbm_bytes_per_s=4800e9,
        flops_per_s=_flops(989e12, int8=1979e12, fp8=1979e12, float32=67e12),
        links=_NVLINK4,
        fast_bytes=227 * KIB,
        cores=132,
        devices_per_chip=1,
        gke_accelerator=None,
        slice_type="",
        counted_per_chip=1,
        max_chips=8,
    ),
)

CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _CHIPS})
"""Every kind there is, by name."""

ALIASES: Mapping[str, str] = MappingProxyType({"v7x": "tpu7x"})
"""Other names in use."""


def chip_named(name: str) -> Chip:
    """A kind of device by its name.

    Raises:
        ConfigError: There is none of that name; the message lists those there are.
    """
    chip = CHIPS.get(ALIASES.get(name, name))
    if chip is None:
        raise ConfigError(f"{name!r} is no chip; the chips are {', '.join(CHIPS)}.", param="topology")
    return chip
