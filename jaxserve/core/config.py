"""Configuration: each setting declared once, read from flags, environment, YAML or its default, in that order.

`ServeConfig` is what the user asked for and may say "auto"; `resolve` answers every "auto" from facts about the
platform and the model and returns a `ResolvedConfig`. Both are frozen. The environment is read by `core/environment`.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from jaxserve.core.environment import ENV_PREFIX, variables
from jaxserve.core.errors import ConfigError
from jaxserve.core.setting import boolean, choice, declare, integer, names, number

MIB = 1 << 20

ACCELERATOR_SEQS = 256
"""Sequences that run at once on an accelerator by default."""

ACCELERATOR_TOKENS = 1024
"""Tokens that a step computes on an accelerator by default: two to six times what keeps its matmuls busy while weights
are read. More makes decodes wait for longer prefills, and its programs are the slowest to compile."""

MEMORY_FRACTION = 0.9
"""Share of a device's memory that weights and pool take together by default."""

MAX_NUM_SEQS = 4096
"""Most sequences that can be asked to run at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshShape:
    """How many ways the model and its traffic are split.

    Attributes:
        data: Replicas that split the sequences; one, for a process serves one replica.
        expert: Shards of the experts; one, for no model here has experts.
        tensor: Shards of heads, ffn and vocabulary.

    Raises:
        ValueError: An axis would split nothing, and its devices repeat the same work.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.data > 1:
            raise ValueError(f"data={self.data}: a process serves one replica; start more, or use tensor=N")
        if self.expert > 1:
            raise ValueError(f"expert={self.expert}: the models served so far have no experts to split; use tensor=N")

    @property
    def num_devices(self) -> int:
        """Devices the mesh takes."""
        return self.data * self.expert * self.tensor

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads `data=1,tensor=8`; axes that are not named are 1."""
        sizes: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, size = part.strip().partition("=")
            if name not in ("data", "expert", "tensor") or name in sizes or not size.isdigit() or int(size) < 1:
                raise ValueError(f"'{part}' is not data=N, expert=N or tensor=N with N >= 1")
            sizes[name] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        return f"data={self.data},expert={self.expert},tensor={self.tensor}"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What `jaxserve serve` can be told; None means "auto" (or absent), and `resolve` decides."""

    model: str = declare(
        "smollm2-135m", str, "what to serve: a preset, a Hugging Face id, a folder, a .gguf file, random:PRESET"
    )
    role: str = declare("both", choice("both"), "both prefill and decode in this process")
    host: str = declare("127.0.0.1", str, "address to listen on")
    port: int = declare(8000, integer(0, 65535), "HTTP port; 0 takes a free one")
    # Who asks for a mesh makes another object than the default, be it equal: that is how a bundle tells them apart.
    mesh: MeshShape = declare(MeshShape(), MeshShape.parse, "how to split the model: tensor=8; other axes stay 1")
    dtype: str | None = declare(
        None,
        choice("float32", "bfloat16", "float16"),
        "dtype of activations and unquantised weights (auto: the checkpoint's; on CPUs bfloat16 for float16)",
        none="auto",
    )
    quantization: str | None = declare(None, choice("int8"), "int8: per-channel weights, int8 activations", none="none")
    kv_cache_dtype: str | None = declare(
        None, choice("float32", "bfloat16", "float16"), "dtype of the KV cache (auto: as dtype)", none="auto"
    )
    attention: str | None = declare(
        None, choice("reference", "xla", "tpu", "gpu"), "implementation of paged attention", none="auto"
    )
    max_model_len: int | None = declare(
        None, integer(2), "most tokens of prompt and output (auto: the model's, if the pool holds it)", none="auto"
    )
    max_num_seqs: int | None = declare(None, integer(1, MAX_NUM_SEQS), "most sequences that run at once", none="auto")
    max_num_batched_tokens: int | None = declare(None, integer(1), "most tokens a step computes", none="auto")
    page_size: int | None = declare(None, integer(1, 1024), "tokens a KV page holds", none="auto")
    num_pages: int | None = declare(None, integer(1), "pages in the KV pool", none="auto")
    memory_fraction: float | None = declare(
        None, number(0.01, 1.0), "share of the device's memory for weights and KV pool together", none="auto"
    )
    enable_prefix_caching: bool = declare(True, boolean, "reuse the KV of prompts that begin alike")
    long_prefill_token_threshold: int | None = declare(
        None, integer(1), "most tokens of one prompt a step computes while others wait", none="auto"
    )
    max_waiting: int = declare(1024, integer(0), "sequences that may wait before requests are refused with a 429")
    served_model_name: tuple[str, ...] = declare((), names, "names the API knows the model by, comma-separated")
    api_key: tuple[str, ...] = declare((), names, "keys that clients must present, comma-separated; none: open to all")
    max_body_bytes: int = declare(8 * MIB, integer(1), "largest request body")
    request_timeout_s: float | None = declare(
        None, number(0.001, 86400), "seconds after which a request is ended with a 504", none="none"
    )
    drain_deadline_s: float = declare(30.0, number(0, 86400), "seconds requests in flight get to finish on SIGTERM")
    seed: int = declare(0, integer(0), "seed of random weights and of requests that bring none")
    cache_dir: Path | None = declare(None, Path, "where models and compiled programs are kept", none="auto")
    compilation_cache: bool = declare(True, boolean, "keep compiled programs on disk between starts")
    bundle: Path | None = declare(
        None, Path, "executables made by `jaxserve compile`, loaded instead of compiling", none="none"
    )
    bundle_key: Path | None = declare(None, Path, "file with the key that the bundle must be signed with", none="none")
    offline: bool = declare(False, boolean, "never touch the network")
    log_level: str = declare("info", choice("debug", "info", "warning", "error"), "least severe messages to log")
    log_format: str = declare("text", choice("text", "json"), "form of a log line")
    otlp_endpoint: str | None = declare(None, str, "OpenTelemetry collector to send spans to", none="none")

    def resolve(self, facts: Facts) -> ResolvedConfig:
        """Answers every "auto".

        Args:
            facts: What is known of the platform and the model.

        Raises:
            ConfigError: The settings contradict each other, the model, or the memory there is.
        """
        on_cpu = facts.platform == "cpu"
        seqs = self.max_num_seqs or (64 if on_cpu else ACCELERATOR_SEQS)
        batched = self.max_num_batched_tokens or (512 if on_cpu else ACCELERATOR_TOKENS)
        if batched < seqs:
            raise ConfigError(
                f"max_num_batched_tokens={batched} is less than max_num_seqs={seqs}: a step could not advance every "
                "sequence; raise the first or lower the second.",
                param="max_num_batched_tokens",
            )
        if self.max_model_len is not None and self.max_model_len > facts.max_position:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is beyond the model's {facts.max_position} positions; lower it.",
                param="max_model_len",
            )
        page_size = self.page_size or (16 if on_cpu else 64)
        num_pages = self._asked_pages(facts, page_size) or self._pages(facts, page_size)
        longest = min(self.max_model_len or facts.max_position, num_pages * page_size)
        if self.max_model_len is not None and longest < self.max_model_len:
            raise ConfigError(
                f"A pool of {num_pages} pages of {page_size} tokens cannot hold one sequence of max_model_len="
                f"{self.max_model_len}; raise num_pages or memory_fraction, or lower max_model_len.",
                param="max_model_len",
            )
        dtype = self.dtype or auto_dtype(facts.platform, facts.checkpoint_dtype)
        if on_cpu:
            # XLA multiplies one float32 row at memory speed; other matmuls want four rows to go through oneDNN.
            smallest = 1 if self.quantization is None and dtype == "float32" else 4
            seq_buckets = _ladder(min(smallest, seqs), seqs)
            token_buckets = {*seq_buckets, *_ladder(min(64, batched), batched)}
        else:
            # Up to some 256 rows an accelerator's matmuls wait for the weights: padding is free, programs are not. The
            # decoder's rows pass between devices twice a layer, though, so few tokens get a size of their own.
            seq_buckets = _ladder(min(64, seqs), seqs, factor=4)
            token_buckets = {min(16, seqs), *seq_buckets, *_ladder(min(256, batched), batched)}
        return ResolvedConfig(
            asked=self,
            dtype=dtype,
            kv_cache_dtype=self.kv_cache_dtype or dtype,
            page_size=page_size,
            num_pages=num_pages,
            max_model_len=longest,
            max_num_seqs=seqs,
            max_num_batched_tokens=batched,
            seq_buckets=seq_buckets,
            token_buckets=tuple(sorted(token_buckets)),
            long_prefill_token_threshold=self.long_prefill_token_threshold or max(1, batched // 2),
        )

    def _asked_pages(self, facts: Facts, page_size: int) -> int | None:
        """The pages that were asked for, if the device holds them."""
        memory = facts.device_memory_bytes
        if memory is None and self.memory_fraction is not None:
            message = "memory_fraction is a share of a device's memory, and a host's is not all ours; use --num-pages."
            raise ConfigError(message, param="memory_fraction")
        most = None if memory is None else (memory - facts.weight_bytes) // (facts.kv_bytes_per_token * page_size)
        if self.num_pages is not None and most is not None and self.num_pages > most:
            raise ConfigError(
                f"A device has room for {max(0, most)} pages of {page_size} tokens beside its "
                f"{facts.weight_bytes / MIB:.0f} MiB of weights, not for num_pages={self.num_pages}; lower it.",
                param="num_pages",
            )
        return self.num_pages

    def _room(self, facts: Facts) -> int:
        """Bytes of a device that its weights leave to the pool."""
        if facts.device_memory_bytes is None:
            return 384 * MIB
        return int(facts.device_memory_bytes * (self.memory_fraction or MEMORY_FRACTION)) - facts.weight_bytes

    def _pages(self, facts: Facts, page_size: int) -> int:
        page_bytes = facts.kv_bytes_per_token * page_size
        if facts.device_memory_bytes is None:
            # Nobody says how much of a host's memory is ours: room for 16k tokens, at most 384 MiB.
            return max(1, min(16384 // page_size, self._room(facts) // page_bytes))
        room = self._room(facts)
        if room < page_bytes:
            raise ConfigError(
                f"The weights take {facts.weight_bytes / MIB:.0f} MiB a device and leave no room for KV pages; use "
                "more devices (--mesh), quantise (--quantization int8), or raise --memory-fraction.",
                param="memory_fraction",
            )
        return room // page_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What `resolve` needs to know.

    Attributes:
        platform: JAX's name of the platform: "cpu", "gpu", "tpu".
        max_position: Longest context the model was made for.
        checkpoint_dtype: Dtype the checkpoint is stored in.
        device_memory_bytes: Memory of one device, or None where nothing limits us.
        weight_bytes: Weights a device holds.
        kv_bytes_per_token: KV cache a token takes on a device, over all layers.
    """

    platform: str
    max_position: int
    checkpoint_dtype: str
    device_memory_bytes: int | None
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig:
    """`ServeConfig` with every "auto" answered.

    Attributes:
        asked: The settings as given.
        dtype: Of activations and unquantised weights.
        kv_cache_dtype: Of the KV pool.
        page_size: Tokens a page holds.
        num_pages: Pages of each layer.
        max_model_len: Most tokens of a sequence.
        max_num_seqs: Slots.
        max_num_batched_tokens: Most tokens a step computes.
        seq_buckets: Numbers of sequences that the head is compiled for, ascending.
        token_buckets: Numbers of tokens that the decoder is compiled for, ascending.
        long_prefill_token_threshold: Most tokens of one prompt a step computes while others wait.
    """

    asked: ServeConfig
    dtype: str
    kv_cache_dtype: str
    page_size: int
    num_pages: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    seq_buckets: tuple[int, ...]
    token_buckets: tuple[int, ...]
    long_prefill_token_threshold: int


def auto_dtype(platform: str, checkpoint_dtype: str) -> str:
    """What `--dtype auto` means: the checkpoint's own, but bfloat16 for float16 where there is no arithmetic for it."""
    return "bfloat16" if platform in ("cpu", "tpu") and checkpoint_dtype == "float16" else checkpoint_dtype


def _ladder(smallest: int, largest: int, *, factor: int = 2) -> tuple[int, ...]:
    """Sizes from `smallest`, each `factor` times the last (1 is followed by 8), ending exactly at `largest`."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(sizes[-1] * (8 if sizes[-1] == 1 else factor), largest))
    return tuple(sizes)


SHAPE_SETTINGS = (
    *("mesh", "dtype", "quantization", "kv_cache_dtype", "attention", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "page_size", "num_pages", "memory_fraction"),
)
"""Settings that decide which programs there are and what memory they take."""


def add_arguments(parser: argparse._ActionsContainer, only: Collection[str] | None = None) -> None:
    """Adds a flag for every setting, or for those named, but the model, which is the command's argument."""
    for setting in fields(ServeConfig):
        if setting.name == "model" or (only is not None and setting.name not in only):
            continue
        default = default_text(setting)
        parser.add_argument(
            _flag(setting.name),
            dest=setting.name,
            metavar="VALUE",
            default=None,
            help=f"{setting.metadata['help']} (default: {default or 'none'})".replace("%", "%%"),
        )


def default_text(setting: Field[Any]) -> str:
    """A setting's default as the user would write it; empty for an empty list."""
    default = setting.metadata["none"] if setting.default is None else setting.default
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else str(default)


def load(
    flags: Mapping[str, str | None], *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> ServeConfig:
    """Reads the settings: flags before environment (`JAXSERVE_PORT`) before the YAML file before defaults.

    Args:
        flags: Setting name to its text, or None where the flag was not given.
        file: YAML mapping of setting names.
        environ: The environment; the process's own by default.

    Raises:
        ConfigError: Unknown names or wrong values; one error lists all.
    """
    environ = variables() if environ is None else environ
    known = {setting.name: setting for setting in fields(ServeConfig)}
    problems: list[str] = []
    texts: dict[str, tuple[str, str]] = {}
    for name, value in (_read_yaml(file) if file is not None else {}).items():
        if name in known:
            texts[name] = (_as_text(value), f"{name} in {file}")
        else:
            problems.append(f"{name} in {file} is not a setting")
    for variable, value in environ.items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable.startswith(ENV_PREFIX) and variable not in _OTHER_VARIABLES:
            if name in known:
                texts[name] = (value, variable)
            else:
                problems.append(f"the environment variable {variable} is not a setting")
    for name, flag in flags.items():
        if flag is not None:
            texts[name] = (flag, "MODEL" if name == "model" else _flag(name))
    values: dict[str, object] = {}
    for name, (text, origin) in texts.items():
        metadata = known[name].metadata
        try:
            values[name] = None if text == metadata["none"] else metadata["parse"](text)
        except ValueError as error:
            problems.append(f"{origin}: {error}")
    if problems:
        raise ConfigError(f"Wrong settings: {'; '.join(problems)}. --help describes them.")
    return ServeConfig(**values)  # type: ignore[arg-type]  # each value came out of its own field's parser


_OTHER_VARIABLES = (f"{ENV_PREFIX}CACHE",)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={size}" for key, size in value.items())
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)


def _read_yaml(file: Path) -> Mapping[str, object]:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {error.strerror}.", param="config") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}", param="config") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must map setting names to values.", param="config")
    return {str(key): value for key, value in content.items()}
