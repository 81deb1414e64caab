"""Configuration: each setting declared once, read from flags, environment, YAML or its default, in that order.

`ServeConfig` is what the user asked for and may say "auto"; `core/resolution` answers every "auto" from facts about the
platform and the model. The environment is read by `core/environment`.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from jaxserve.core.environment import ENV_PREFIX, service_links, variables
from jaxserve.core.errors import ConfigError
from jaxserve.core.setting import boolean, choice, declare, hosts, integer, names, networks, number, origins

_MIB = 1 << 20

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
    """What `jaxserve serve` can be told; None means "auto" (or absent), and `core/resolution` decides."""

    model: str = declare(
        "smollm2-135m", str, "what to serve: a preset, a Hugging Face id, a folder, a .gguf file, random:PRESET"
    )
    ignore_config_keys: tuple[str, ...] = declare(
        (), names, "unknown keys of the model's config to pass over, comma-separated; those of a section as section.key"
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
    max_waiting: int = declare(
        1024, integer(0), "sequences that may wait before requests are refused with a 429; of one client at most 72 %"
    )
    chat_template: Path | None = declare(
        None, Path, "file with the Jinja chat template to use (none: the model's own)", none="none"
    )
    served_model_name: tuple[str, ...] = declare((), names, "names the API knows the model by, comma-separated")
    generation_config: str = declare(
        "auto",
        choice("auto", "none"),
        "where requests get temperature, top_p, top_k, min_p, repetition_penalty and max_tokens that they do not give: "
        "auto takes those of the preset or of the checkpoint (generation_config.json); none takes neutral ones",
    )
    api_key: tuple[str, ...] = declare(
        (), names, "keys that clients must present, comma-separated; none: open to all", secret=True
    )
    api_key_file: Path | None = declare(
        None, Path, "file of further keys, one a line, which no list of processes shows", none="none"
    )
    tls_cert: Path | None = declare(None, Path, "certificate chain (PEM) to serve HTTPS with", none="none")
    tls_key: Path | None = declare(None, Path, "private key (PEM) of that certificate", none="none")
    allowed_hosts: tuple[str, ...] | None = declare(
        None,
        hosts,
        "hosts that requests may be for, comma-separated: names, *.names, addresses, networks, or * for all; loopback "
        "always may (auto: only loopback when listening on loopback, all otherwise)",
        none="auto",
    )
    allowed_origins: tuple[str, ...] = declare(
        (), origins, "origins whose web pages may use the API (CORS), comma-separated, or * for all"
    )
    max_connections: int | None = declare(
        None, integer(1), "most connections at once (auto: what the limit on open files allows)", none="auto"
    )
    trusted_proxies: tuple[str, ...] = declare(
        (),
        networks,
        "addresses and networks whose X-Forwarded-For and fairness header are believed where no keys are asked for, "
        "comma-separated",
    )
    min_priority: int = declare(
        -10, integer(-1_000_000, 0), "lowest (most urgent) priority of requests; a level is worth a minute of waiting"
    )
    max_priority: int = declare(10, integer(0, 1_000_000), "highest (least urgent) priority of requests")
    share_prefix_cache: bool = declare(False, boolean, "share cached prefixes between API keys")
    max_body_bytes: int = declare(8 * _MIB, integer(1), "largest request body")
    request_timeout_s: float | None = declare(
        None, number(0.001, 86400), "seconds after which a request is ended with a 504", none="none"
    )
    step_timeout_s: float = declare(
        300.0, number(0.001, 86400), "seconds of one step after which /ready fails; /health fails after twice as many"
    )
    drain_deadline_s: float = declare(
        30.0, number(0, 86400), "seconds requests in flight get to finish when told to end"
    )
    seed: int = declare(0, integer(0), "seed of random weights and of requests that bring none")
    cache_dir: Path | None = declare(None, Path, "where models and compiled programs are kept", none="auto")
    verify_model: bool = declare(
        False, boolean, "hash the model's files and compare with their checksums before loading; about 1 s a GB"
    )
    compilation_cache: bool = declare(True, boolean, "keep compiled programs on disk between starts")
    bundle: Path | None = declare(
        None, Path, "executables made by `jaxserve compile`, loaded instead of compiling", none="none"
    )
    bundle_key: Path | None = declare(None, Path, "file with the key that the bundle must be signed with", none="none")
    offline: bool = declare(False, boolean, "never touch the network")
    log_level: str = declare("info", choice("debug", "info", "warning", "error"), "least severe messages to log")
    log_format: str = declare("text", choice("text", "json"), "form of a log line")
    otlp_endpoint: str | None = declare(None, str, "OpenTelemetry collector to send spans to", none="none")


SHAPE_SETTINGS = (
    *("mesh", "dtype", "quantization", "kv_cache_dtype", "attention", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "page_size", "num_pages", "memory_fraction"),
)
"""Settings that decide which programs there are and what memory they take."""

PLAN_SETTINGS = (*SHAPE_SETTINGS, "ignore_config_keys")
"""Settings that matter where a model is read and its programs are compiled, but not served."""


def add_arguments(parser: argparse._ActionsContainer, only: Collection[str] | None = None) -> None:
    """Adds a flag for every setting, or for those named, but the model, which is the command's argument."""
    for setting in fields(ServeConfig):
        if setting.name == "model" or (only is not None and setting.name not in only):
            continue
        default = default_text(setting)
        help_text = f"{setting.metadata['help']} (default: {default or 'none'})".replace("%", "%%")
        flag = _flag(setting.name)
        if setting.metadata["parse"] is boolean:
            parser.add_argument(flag, dest=setting.name, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            parser.add_argument(flag, dest=setting.name, metavar="VALUE", help=help_text)


def default_text(setting: Field[Any]) -> str:
    """A setting's default as the user would write it; empty for an empty list."""
    default = setting.metadata["none"] if setting.default is None else setting.default
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else str(default)


def load(
    flags: Mapping[str, str | bool | None], *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> ServeConfig:
    """Reads the settings: flags before environment (`JAXSERVE_PORT`) before the YAML file before defaults.

    Args:
        flags: Setting name to its text, to whether a `--flag` or its `--no-flag` was given, or to None for neither.
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
    no_settings = (*_OTHER_VARIABLES, *service_links(environ))
    for variable, value in environ.items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable.startswith(ENV_PREFIX) and variable not in no_settings:
            if name in known:
                texts[name] = (value, variable)
            else:
                problems.append(f"the environment variable {variable} is not a setting")
    for name, flag in flags.items():
        if flag is not None:
            texts[name] = (_as_text(flag), "MODEL" if name == "model" else _flag(name))
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
