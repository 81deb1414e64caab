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
