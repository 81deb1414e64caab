"""What accelerators can do: the published figures that memory plans and time estimates divide by.

A figure is for one JAX device: a chip, except on TPU v7x, whose chips are two devices each. Bandwidth of the
interconnect is what a device can send around a ring: both directions of one axis of links on a TPU, NVLink one way on
a GPU. Peaks are dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxserve.core.errors import ConfigError

GIB = 1 << 30
KIB = 1 << 10


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a kind.

    Attributes:
        name: As topologies call it.
        title: As its maker calls it.
        platform: JAX's name of its kind, "tpu" or "gpu".
        hbm_bytes: Memory.
        hbm_bytes_per_s: Its bandwidth.
        flops_per_s: Dense operations a second, by number format of the operands.
        link_bytes_per_s: Bytes a second that a device sends around a ring.
        fast_bytes: VMEM of a TensorCore, or shared memory a block can have.
        scalar_bytes: SMEM of a TensorCore, 0 on GPUs.
        cores: TensorCores or streaming multiprocessors.
        devices_per_chip: JAX devices a chip is.
        gke_accelerator: Value of the node selector `cloud.google.com/gke-tpu-accelerator`, None off GKE's TPUs.
        slice_type: What the TPU runtime calls a slice, with {} for the number it counts (cores or chips).
        counted_per_chip: What the slice type counts in a chip.
    """

    name: str
    title: str
    platform: str
    hbm_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    link_bytes_per_s: float
    fast_bytes: int
    scalar_bytes: int
    cores: int
    devices_per_chip: int
    gke_accelerator: str | None
    slice_type: str
    counted_per_chip: int

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


# TPUs: cloud.google.com/tpu/docs (system architecture pages of each version). float32 goes through the matrix unit in
# six bfloat16 passes. Links one way: 45 GB/s (v4, v5e), 90 GB/s (v5p, v6e, v7x), times
# the two directions of a ring.
# GPUs: NVIDIA's H100 and H200 data sheets (SXM), dense figures; NVLink 4 at 450 GB/s each way.
_CHIPS = (
    Chip(
        name="v4",
        title="TPU v4",
        platform="tpu",
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=1228e9,
        flops_per_s=_flops(275e12, int8=275e12, float32=275e12 / 6),
        link_bytes_per_s=90e9,
        fast_bytes=16 << 20,
        scalar_bytes=1 << 20,
        cores=2,
        devices_per_chip=1,
        gke_accelerator="tpu-v4-podslice",
        slice_type="v4-{}",
        counted_per_chip=2,
    ),
    Chip(
        name="v5e",
        title="TPU v5e",
        platform="tpu",
        hbm_bytes=16 * GIB,
        hbm_bytes_per_s=820e9,
        flops_per_s=_flops(197e12, int8=394e12, float32=197e12 / 6),
        link_bytes_per_s=90e9,
        fast_bytes=128 << 20,
        scalar_bytes=1 << 20,
        cores=1,
        devices_per_chip=1,
        gke_accelerator="tpu-v5-lite-podslice",
        slice_type="v5litepod-{}",
        counted_per_chip=1,
    ),
    Chip(
        name="v5p",
        title="TPU v5p",
        platform="tpu",
        hbm_bytes=95 * GIB,
        hbm_bytes_per_s=2765e9,
        flops_per_s=_flops(459e12, int8=918e12, float32=459e12 / 6),
        link_bytes_per_s=180e9,
        fast_bytes=64 << 20,
        scalar_bytes=1 << 20,
        cores=2,
        devices_per_chip=1,
        gke_accelerator="tpu-v5p-slice",
        slice_type="v5p-{}",
        counted_per_chip=2,
    ),
    Chip(
        name="v6e",
        title="TPU v6e (Trillium)",
        platform="tpu",
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=1640e9,
        flops_per_s=_flops(918e12, int8=1836e12, float32=918e12 / 6),
        link_bytes_per_s=180e9,
        fast_bytes=128 << 20,
        scalar_bytes=1 << 20,
        cores=1,
        devices_per_chip=1,
        gke_accelerator="tpu-v6e-slice",
        slice_type="v6e-{}",
        counted_per_chip=1,
    ),
    Chip(
        name="tpu7x",
        title="TPU v7x (Ironwood)",
        platform="tpu",
        hbm_bytes=96 * GIB,
        hbm_bytes_per_s=3690e9,
        flops_per_s=_flops(1153e12, fp8=2307e12, float32=1153e12 / 6),
        link_bytes_per_s=180e9,
        fast_bytes=64 << 20,
        scalar_bytes=1 << 20,
        cores=1,
        devices_per_chip=2,
        gke_accelerator="tpu7x",
        slice_type="tpu7x-{}",
        counted_per_chip=2,
    ),
    Chip(
        name="h100",
        title="NVIDIA H100 SXM",
        platform="gpu",
        hbm_bytes=80 * 10**9,
        hbm_bytes_per_s=3350e9,
        flops_per_s=_flops(989e12, int8=1979e12, fp8=1979e12, float32=67e12),
        link_bytes_per_s=450e9,
        fast_bytes=227 * KIB,
        scalar_bytes=0,
        cores=132,
        devices_per_chip=1,
        gke_accelerator=None,
        slice_type="",
        counted_per_chip=1,
    ),
    Chip(
        name="h200",
        title="NVIDIA H200 SXM",
        platform="gpu",
        hbm_bytes=141 * 10**9,
        hbm_bytes_per_s=4800e9,
        flops_per_s=_flops(989e12, int8=1979e12, fp8=1979e12, float32=67e12),
        link_bytes_per_s=450e9,
        fast_bytes=227 * KIB,
        scalar_bytes=0,
        cores=132,
        devices_per_chip=1,
        gke_accelerator=None,
        slice_type="",
        counted_per_chip=1,
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
