"""What executables were compiled for: every fact that must be the same where they are to run.

A bundle's manifest keeps it; whoever loads the bundle makes its own and compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from jaxserve.core.config import ServeConfig
from jaxserve.core.environment import variables
from jaxserve.engine.programs import Replica
from jaxserve.models.spec import ModelSpec

FORMAT = 1

_SHAPING_PACKAGES = ("engine", "kv", "models", "pallas", "quant", "sampling", "sharding")
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# These change what is seen or printed, not what is compiled. JAX itself adds the last one where there is a TPU; libtpu
# makes the same executable with it and without.
_HARMLESS_FLAGS = (
    *("--xla_dump", "--xla_force_host_platform_device_count"),
    "--xla_tpu_use_enhanced_launch_barrier",
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an executable was compiled for, apart from the model; all of it must be the same where it runs.

    Attributes:
        format: Version of the bundle's form.
        jaxserve: Version of jaxserve.
        code: Digest of the sources that programs are made of.
        jax: Version of jax.
        jaxlib: Version of jaxlib.
        compiler: Version of libtpu or of the CUDA plugin, None on CPUs.
        flags: What the compiler was told through the environment.
        device_kind: JAX's name of the device.
        model: Digest of the model's spec.
        mesh: Sizes of the mesh axes.
        dtype: Of activations and unquantised weights.
        quantization: Of the weights, None for none.
        attention: Implementation of paged attention that was asked for, None for the best.
        kv_dtype: Of the KV pool.
        page_size: Tokens a page holds.
        num_pages: Pages of each layer.
        max_model_len: Most tokens of a sequence.
        token_buckets: Sizes of the decoder's steps.
        seq_buckets: Sizes of the head's steps.
    """

    format: int
    jaxserve: str
    code: str
    jax: str
    jaxlib: str
    compiler: str | None
    flags: tuple[str, ...]
    device_kind: str
    model: str
    mesh: Mapping[str, int]
    dtype: str
    quantization: str | None
    attention: str | None
    kv_dtype: str
    page_size: int
    num_pages: int
    max_model_len: int
    token_buckets: tuple[int, ...]
    seq_buckets: tuple[int, ...]

    @classmethod
    def of(cls, replica: Replica, config: ServeConfig) -> Origin:
        """What a replica's programs are compiled for in this process."""
        device = replica.mesh.devices.flat[0]
        layout = replica.layout
        return cls(
            format=FORMAT,
            jaxserve=version("jaxserve"),
            code=_code_digest(),
            jax=version("jax"),
            jaxlib=version("jaxlib"),
            compiler=_compiler(device.platform),
            flags=compiler_flags(variables()),
            device_kind=device.device_kind,
            model=spec_digest(replica.blueprint.spec),
            mesh=dict(replica.mesh.shape),
            dtype=replica.blueprint.dtype.name,
            quantization=config.quantization,
            attention=config.attention,
            kv_dtype=layout.dtype.name,
            page_size=layout.page_size,
            num_pages=layout.num_pages,
            max_model_len=replica.limits.max_model_len,
            token_buckets=replica.buckets.tokens,
            seq_buckets=replica.buckets.seqs,
        )

    def differences(self, **here: object) -> list[str]:
        """What is not the same here, with both values.

        Args:
            **here: What is so here, by field.
        """
        pairs = ((name.name, vars(self)[name.name], here[name.name]) for name in fields(self) if name.name in here)
        return [
            f"{_WORDS.get(name, name)} {_as_text(was)} (here {_as_text(now)})" for name, was, now in pairs if was != now
        ]


_WORDS = {"code": "jaxserve's sources", "flags": "compiler flags", "model": "another model, whose spec is"}
"""What differences call a field, where its name says little."""


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return ",".join(f"{name}={size}" for name, size in value.items()) if isinstance(value, Mapping) else str(value)


def spec_digest(spec: ModelSpec) -> str:
    """What tells one model's mathematics from another's; numbers count as float32, as GGUF files keep them."""
    plain = json.dumps(asdict(spec), sort_keys=True, default=str)
    rounded = json.loads(plain, parse_float=lambda text: str(np.float32(text)))
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()[:16]


def cpu_features(replica: Replica) -> tuple[str, ...]:
    """What this host's processor can do, as Linux says it; empty if the replica is not for CPUs or nobody says."""
    source = Path("/proc/cpuinfo")
    if replica.mesh.devices.flat[0].platform != "cpu" or not source.is_file():
        return ()
    for line in source.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


def _code_digest() -> str:
    """Digest of the sources that programs are made of."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for name in _SHAPING_PACKAGES:
        for path in sorted((package / name).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compiler(platform: str) -> str | None:
    """Version of what compiles for a platform outside jaxlib."""
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-pjrt"}.get(platform)
    if package is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def compiler_flags(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What an environment tells XLA and libtpu that changes executables."""
    flags = " ".join(environ.get(name, "") for name in _FLAG_VARIABLES).split()
    return tuple(sorted(flag for flag in flags if not flag.startswith(_HARMLESS_FLAGS)))
