"""What executables were compiled for: every fact that must be the same where they are to run.

A bundle's manifest keeps it; whoever loads the bundle makes its own and compares.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.core.config import ServeConfig
from jaxserve.core.environment import variables
from jaxserve.core.errors import ConfigError
from jaxserve.engine.programs import Replica
from jaxserve.models.spec import ModelSpec

FORMAT = 3
"""2 and before could hold executables that JAX had read from its cache, without their code."""

_SHAPING_PACKAGES = ("engine", "kv", "models", "pallas", "quant", "sampling", "sharding")
_SHAPING_FILES = (".py", ".json")
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# These change what is seen or printed, not what is compiled. JAX itself adds the last one where there is a TPU; libtpu
# makes the same executable with it and without.
_HARMLESS_FLAGS = (
    *("--xla_dump", "--xla_force_host_platform_device_count"),
    "--xla_tpu_use_enhanced_launch_barrier",
)
_FLAG = re.compile(r"""[^\s=]+=(?:"(?:\\.|[^"\\])*"|'[^']*')|\S+""")
"""A flag of a compiler; its value may hold spaces in quotes."""

_SWITCH = re.compile(r"[^=]+(?:=(?:true|false|[-+]?\d+(?:\.\d*)?))?", re.IGNORECASE)
"""A flag that is a switch or a number."""

_JAX_SETTINGS = (
    *("jax_enable_x64", "jax_explicit_x64_dtypes", "jax_default_matmul_precision", "jax_allow_f16_reductions"),
    *("jax_default_prng_impl", "jax_threefry_partitionable", "jax_threefry_gpu_kernel_lowering"),
    *(
        "jax_random_seed_offset",
        "jax_high_dynamic_range_gumbel",
        "jax_accurate_erf_inv",
        "jax_use_hlo_logistic_lowering",
    ),
    *("jax_use_shardy_partitioner", "jax_optimization_level", "jax_exec_time_optimization_effort"),
    *("jax_memory_fitting_level", "jax_memory_fitting_effort", "jax_disable_most_optimizations"),
    *("jax_compiler_enable_remat_pass", "jax_xla_profile_version", "jax_enable_pgle"),
    *("jax_pallas_enable_debug_checks", "jax_pallas_poison_buffers", "jax_mosaic_allow_hlo"),
)
"""What JAX can be told, by its own variables or in code, that changes programs; not every version has every one."""

_COMPILERS = {"tpu": ("libtpu", "libtpu-nightly"), "gpu": ("jax-cuda13-pjrt", "jax-cuda12-pjrt")}
"""Packages that compile for a platform, where jaxlib does not."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an executable was compiled for, apart from the model; all of it must be the same where it runs.

    Attributes:
        format: Version of the bundle's form.
        jaxserve: Version of jaxserve.
        code: Digest of the sources that programs are made of.
        jax: Version of jax.
        jaxlib: Version of jaxlib.
        compiler: Name and version of libtpu or of the CUDA plugin, None on CPUs.
        flags: What the compiler was told through the environment.
        jax_settings: What JAX was told that changes programs.
        device_kind: JAX's name of the device.
        places: The slice and where in it each device of the mesh is, None where devices have no places.
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
    jax_settings: tuple[str, ...]
    device_kind: str
    places: str | None
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
            code=code_digest(Path(__file__).resolve().parents[1]),
            jax=version("jax"),
            jaxlib=version("jaxlib"),
            compiler=compiler_of(device.platform),
            flags=compiler_flags(variables()),
            jax_settings=jax_settings(jax.config.values),
            device_kind=device.device_kind,
            places=places(replica.mesh),
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
            f"{_WORDS.get(name, name)} {_as_text(was, now)} (here {_as_text(now, was)})"
            for name, was, now in pairs
            if was != now
        ]


_WORDS = {
    "code": "jaxserve's sources",
    "flags": "compiler flags",
    "jax_settings": "JAX's settings",
    "model": "another model, whose spec is",
    "places": "devices at",
}
"""What differences call a field, where its name says little."""


def _as_text(value: object, other: object) -> str:
    """A value as a difference shows it: of flags and settings only those that the other side has not."""
    if isinstance(value, tuple):
        shared = {each for each in value if isinstance(each, str)} & set(other if isinstance(other, tuple) else ())
        return ",".join(str(each) for each in value if each not in shared) or "none"
    return ",".join(f"{name}={size}" for name, size in value.items()) if isinstance(value, Mapping) else str(value)


def spec_digest(spec: ModelSpec) -> str:
    """What tells one model's mathematics from another's; numbers count as float32, as GGUF files keep them.

    Which tokens begin and end a text is no mathematics: a model's files name more of them than its preset.
    """
    facts = {name: value for name, value in asdict(spec).items() if name not in ("bos_token_id", "eos_token_ids")}
    # Ropes of two kinds may have the same numbers.
    plain = json.dumps([facts, type(spec.rope.scaling).__name__], sort_keys=True, default=str)
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


def code_digest(package: Path) -> str:
    """Digest of the sources that programs are made of, tuned tile sizes among them.

    Args:
        package: The folder of jaxserve's packages.
    """
    digest = hashlib.sha256()
    for name in _SHAPING_PACKAGES:
        for path in sorted((package / name).rglob("*")):
            if path.suffix in _SHAPING_FILES:
                digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler_of(platform: str) -> str | None:
    """Name and version of what compiles for a platform, None if that is jaxlib.

    Raises:
        ConfigError: None of the packages is installed that are known to, so that nobody can say what it is.
    """
    packages = _COMPILERS.get(platform)
    if packages is None:
        return None
    found = []
    for package in packages:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    if not found:
        raise ConfigError(
            f"Cannot tell the version of the compiler for {platform}, which a bundle depends on: none of "
            f"{', '.join(packages)} is installed. Install one, or serve without --bundle.",
            param="bundle",
        )
    return ", ".join(found)


def places(mesh: Mesh) -> str | None:
    """Where in its slice each device of a mesh is, in the order of the mesh; None for devices without places.

    Chips of a TPU talk to their neighbours, so an executable for 2x4 chips is not one for 4x4, even on as many of them.
    """
    devices: list[Any] = list(mesh.devices.flat)
    if devices[0].platform != "tpu":
        return None
    found = (f"{','.join(map(str, device.coords))}/{device.core_on_chip}" for device in devices)
    whole: list[Any] = devices[0].client.devices()
    sides = (1 + max(along) for along in zip(*(device.coords for device in whole), strict=True))
    return f"{' '.join(found)} of {'x'.join(map(str, sides))}"


def jax_settings(values: Mapping[str, object]) -> tuple[str, ...]:
    """Those of JAX's settings that change executables, as text; a version of JAX does not have every one.

    Args:
        values: All settings, by name.
    """
    return tuple(f"{name}={values[name]}" for name in _JAX_SETTINGS if name in values)


def compiler_flags(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What an environment tells XLA and libtpu that changes executables: each flag once, as it takes effect.

    Of the values of a switch or a number the last counts. XLA gathers those of some other flags, such as
    --xla_disable_hlo_passes; they are all kept, in their order, in one text.

    Raises:
        ConfigError: XLA is told to read flags from a file that cannot be read.
    """
    found = []
    for variable in _FLAG_VARIABLES:
        given: dict[str, list[str]] = {}
        for flag in _FLAG.findall(_flag_text(variable, environ.get(variable, ""))):
            if not flag.startswith(_HARMLESS_FLAGS):
                name = flag.partition("=")[0]
                former = [] if _SWITCH.fullmatch(flag) else given.get(name, [])
                given[name] = [*former, flag]
        found += [" ".join(given[name]) for name in sorted(given)]
    return tuple(found)


def _flag_text(variable: str, value: str) -> str:
    """What a variable tells a compiler; XLA takes what does not begin with a dash for the name of a file of flags."""
    if variable != "XLA_FLAGS" or not value or value.lstrip().startswith("-"):
        return value
    try:
        return Path(value).read_text(errors="replace")
    except OSError as error:
        raise ConfigError(
            f"Cannot read {value}, the file of flags that XLA_FLAGS names: {error.strerror}.", param="bundle"
        ) from error
