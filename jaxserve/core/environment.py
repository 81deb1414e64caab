"""The only reader of the process's environment; everything else is passed what it needs."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

ENV_PREFIX = "JAXSERVE_"

_LOG = logging.getLogger(__name__)


def variables() -> Mapping[str, str]:
    """The process's environment."""
    return os.environ


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that this one starts: its own, and what is said here."""
    return {**os.environ, **extra}


def cache_dir(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where models and compiled programs are kept unless the user says otherwise; None without a home directory."""
    environ = variables() if environ is None else environ
    if own := environ.get(f"{ENV_PREFIX}CACHE"):
        return Path(own)
    if base := environ.get("XDG_CACHE_HOME"):
        return Path(base) / "jaxserve"
    try:
        return Path.home() / ".cache" / "jaxserve"
    except RuntimeError:  # no HOME, and the user is not in the user database, as in some containers
        return None


_PROTOCOL = "(TCP|UDP|SCTP)"
_SERVICE_LINKS = tuple(
    (re.compile(rf"{ENV_PREFIX}([A-Z0-9_]+_)?({name})"), re.compile(value))
    for name, value in (
        (rf"SERVICE_HOST|PORT_\d+_{_PROTOCOL}_ADDR", r"[0-9a-fA-F:.]+"),
        (rf"SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_{_PROTOCOL}_PORT", r"\d+"),
        (rf"PORT_\d+_{_PROTOCOL}_PROTO", r"tcp|udp|sctp"),
        (rf"PORT(_\d+_{_PROTOCOL})?", r"(tcp|udp|sctp)://\S+:\d+"),
    )
)
"""Names and values of the variables that Kubernetes puts into each pod for a Service called jaxserve or jaxserve-*."""


def service_links(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Names of the variables with our prefix that Kubernetes has set for a Service; they are no settings.

    Both name and value must have the form of such a variable: `JAXSERVE_PORT=tcp://10.0.0.1:8000` is one,
    `JAXSERVE_PORT=8000` is the setting.
    """
    environ = variables() if environ is None else environ
    return tuple(
        variable
        for variable, value in environ.items()
        if any(name.fullmatch(variable) and form.fullmatch(value) for name, form in _SERVICE_LINKS)
    )


def warn_of_service_links() -> None:
    """Logs which variables are passed over because Kubernetes has set them for a Service of our name."""
    if names := service_links():
        _LOG.warning(
            "passed over %s: Kubernetes sets them for a Service whose name begins with jaxserve; "
            "enableServiceLinks: false keeps them out of a pod",
            ", ".join(names),
        )


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
_SET_BY_JAX = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")


def tpu_is_absent(root: Path = Path("/")) -> bool:
    """Whether libtpu is installed, to compile for TPUs, but there is no TPU, and nobody has said what JAX should use.

    Left to itself JAX would start one: ask a metadata server that is not there, and print errors. With another plugin
    installed, a GPU's for example, the choice is JAX's.

    Args:
        root: Of the file system.
    """
    told = PLATFORMS in os.environ or any(name.startswith("TPU_") and name not in _SET_BY_JAX for name in os.environ)
    if told or find_spec("libtpu") is None or find_spec("jax_plugins") is not None:
        return False
    return not _has_tpu(root)


def leave_out_absent_tpu(root: Path = Path("/")) -> bool:
    """Tells JAX to use the CPU alone if `tpu_is_absent`; call it before JAX is imported.

    Args:
        root: Of the file system.

    Returns:
        Whether it did.
    """
    absent = tpu_is_absent(root)
    if absent:
        os.environ[PLATFORMS] = "cpu"
    return absent


GPU_MEMORY_SHARE = 0.95
"""Share of a GPU's memory that JAX takes for itself; CUDA, cuBLAS and NCCL need the rest. JAX's default is 0.75."""

GPU_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Where JAX is told another share; the second name is the older one, and JAX takes only one of them."""


def take_gpu_memory() -> None:
    """Tells JAX to take `GPU_MEMORY_SHARE` of a GPU unless somebody has said how much; call it before JAX starts."""
    if not any(name in os.environ for name in GPU_SHARE_VARIABLES):
        os.environ[GPU_SHARE_VARIABLES[0]] = str(GPU_MEMORY_SHARE)


def _has_tpu(root: Path) -> bool:
    """Whether there is a device file of a TPU, or a Google device on the PCI bus."""
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    return any(path.read_text().strip() == _GOOGLE for path in root.glob("sys/bus/pci/devices/*/vendor"))
