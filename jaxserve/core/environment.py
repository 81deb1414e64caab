"""The only reader of the process's environment; everything else is passed what it needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ENV_PREFIX = "JAXSERVE_"


def variables() -> Mapping[str, str]:
    """The process's environment."""
    return os.environ


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that this one starts: its own, and what is said here."""
    return {**os.environ, **extra}


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where models and compiled programs are kept unless the user says otherwise."""
    environ = variables() if environ is None else environ
    if own := environ.get(f"{ENV_PREFIX}CACHE"):
        return Path(own)
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxserve"


CLUSTER_VARIABLES = (
    *("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
    *("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"),
)
"""What GKE and a LeaderWorkerSet tell a pod about the slice it is part of."""


def cluster_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Those of `CLUSTER_VARIABLES` that are set."""
    environ = variables() if environ is None else environ
    return {name: environ[name] for name in CLUSTER_VARIABLES if environ.get(name)}


PLATFORMS = "JAX_PLATFORMS"
_GOOGLE = "0x1ae0"


def leave_out_absent_tpu(*, has_libtpu: bool, has_cuda: bool, root: Path = Path("/")) -> bool:
    """Tells JAX to use the CPU alone where libtpu is installed, to compile for TPUs, and there is no TPU.

    JAX would start one: ask a metadata server that is not there, and print errors. Call it before JAX is imported.

    Args:
        has_libtpu: Whether libtpu is installed.
        has_cuda: Whether JAX's CUDA plugin is; then the choice is JAX's.
        root: Of the file system.

    Returns:
        Whether it did.
    """
    told = PLATFORMS in os.environ or any(name.startswith("TPU_") for name in os.environ)
    if told or has_cuda or not has_libtpu or _has_tpu(root):
        return False
    os.environ[PLATFORMS] = "cpu"
    return True


def _has_tpu(root: Path) -> bool:
    """Whether there is a device file of a TPU, or a Google device on the PCI bus."""
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    return any(path.read_text().strip() == _GOOGLE for path in root.glob("sys/bus/pci/devices/*/vendor"))
