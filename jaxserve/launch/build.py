"""From a configuration to an engine that is ready: source, spec, parameters, programs, loop.

Nothing here decides anything; it wires what the other packages own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.checkpoint.checksums import Check
from jaxserve.checkpoint.presets import default_presets_dir, read_preset
from jaxserve.checkpoint.sampling_defaults import load_sampling_defaults
from jaxserve.checkpoint.sources import CheckpointSource, load_spec, load_tokenizer, resolve_source, with_ends
from jaxserve.core.config import ServeConfig
from jaxserve.core.environment import cache_dir
from jaxserve.core.errors import CheckpointError, ConfigError, InvalidRequestError, JaxserveError
from jaxserve.core.heap import release_free_memory
from jaxserve.core.resolution import Facts, ResolvedConfig, auto_dtype, resolve
from jaxserve.core.types import NO_DEFAULTS, SamplingDefaults
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.batch import Buckets
from jaxserve.engine.compile import (
    CompileCounter,
    enable_persistent_cache,
)
from jaxserve.engine.fairness import FairnessConfig
from jaxserve.engine.loop import LocalEngine, StepObserver
from jaxserve.engine.policy import SchedulerConfig
from jaxserve.engine.programs import Replica
from jaxserve.engine.runner import DeviceRunner
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.watchdog import Watchdog
from jaxserve.kv.manager import KVManager
from jaxserve.kv.pool import PoolLayout, held_heads
from jaxserve.launch.bundle import Bundle, open_bundle, read_key
from jaxserve.launch.loading import load_and_compile
from jaxserve.models.costs import weight_bytes
from jaxserve.models.decoder import Blueprint
from jaxserve.models.spec import ModelSpec
from jaxserve.pallas.dispatch import Backend, preference
from jaxserve.quant.bits import storage_dtype
from jaxserve.sampling.validate import MAX_STOP_IDS, SamplingLimits, validate_sampling
from jaxserve.sharding.mesh import TENSOR, make_mesh
from jaxserve.sharding.rules import kv_repeat
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.template_file import read_template
from jaxserve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_PAGES = (1 << 31) - 1
"""Pages of all layers together: their numbers are int32."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is known of a model before any weight is read.

    Attributes:
        source: Where it is.
        spec: Its mathematics.
        tokenizer: Text to ids and back.
        chat_template: Messages to text; None if the model has none.
        name: What it is served as.
        sampling_defaults: Of requests that do not say.
    """

    source: CheckpointSource
    spec: ModelSpec
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    name: str
    sampling_defaults: SamplingDefaults = NO_DEFAULTS


def find_model(config: ServeConfig, progress: Progress | None = None) -> Model:
    """Fetches what MODEL names, if it is not here yet, and reads all but its weights."""
    source = resolve_source(
        config.model,
        cache_dir=config.cache_dir or cache_dir(),
        presets_dir=default_presets_dir(),
        offline=config.offline,
        progress=progress,
        check=Check.HASHES if config.verify_model else Check.SIZES,
    )
    spec = load_spec(source, passed_over=config.ignore_config_keys)
    tokenizer = load_tokenizer(source, spec)
    # A sequence ends where either of them says so: configs often name one end, and tokenizers the chat's.
    spec = with_ends(spec, tokenizer.eos_token_ids)
    if tokenizer.vocab_size > spec.vocab_size:
        logger.warning(
            "the tokenizer has ids up to %d, the model only up to %d: texts with those between are refused",
            *(tokenizer.vocab_size - 1, spec.vocab_size - 1),
        )
    return Model(
        source=source,
        spec=spec,
        tokenizer=tokenizer,
        chat_template=_chat_template(config, tokenizer),
        name=config.served_model_name[0] if config.served_model_name else source.name,
        sampling_defaults=_sampling_defaults(config, source, spec),
    )


def _sampling_defaults(config: ServeConfig, source: CheckpointSource, spec: ModelSpec) -> SamplingDefaults:
    """The model's, unless nobody wants them.

    Raises:
        CheckpointError: They are nothing that a request could ask for.
    """
    if config.generation_config == "none":
        return NO_DEFAULTS
    defaults = load_sampling_defaults(source, read_preset(config.model, default_presets_dir()))
    try:
        validate_sampling(
            defaults.params(), SamplingLimits(vocab_size=spec.vocab_size, max_model_len=spec.max_position)
        )
    except InvalidRequestError as error:
        raise CheckpointError(
            f"The sampling defaults of {source.name} cannot be used: {error.message} Correct them, or pass over them "
            "with --generation-config none."
        ) from error
    return defaults


def _chat_template(config: ServeConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The one in the file that was given, or the model's; a model that has one for tools only has it for everything.

    Raises:
        ConfigError: The file that was given cannot be read or holds no valid template.
    """
    if config.chat_template is not None:
        return _given_template(config.chat_template, tokenizer)
    default, tools = tokenizer.chat_template, tokenizer.tool_chat_template
    source = tools if default is None else default
    return None if source is None else ChatTemplate(source, tokenizer.special_tokens, tool_source=tools)


def _given_template(file: Path, tokenizer: Tokenizer) -> ChatTemplate:
    template = ChatTemplate(read_template(file), tokenizer.special_tokens)
    try:
        template.check()
    except JaxserveError as error:
        template.close()
        raise ConfigError(f"{error.message} It is in --chat-template {file}.", param="chat_template") from error
    return template


def require_attention(config: ServeConfig, platform: str) -> None:
    """Makes sure that the attention that was asked for runs on a platform.

    Args:
        config: What was asked for.
        platform: JAX's name of it.

    Raises:
        ConfigError: It does not.
    """
    # JAX interprets a TPU's kernels on CPUs.
    possible = (*preference(platform), *((Backend.TPU,) if platform == "cpu" else ()))
    if config.attention is not None and config.attention not in possible:
        raise ConfigError(
            f"--attention {config.attention} does not run on a {platform.upper()}; use {', '.join(possible)}, or leave "
            "it out for the best.",
            param="attention",
        )


def plan_replica(
    config: ServeConfig, spec: ModelSpec, mesh: Mesh, *, device_memory_bytes: int | None = None
) -> tuple[Replica, ResolvedConfig]:
    """Fixes every shape of a replica; no array is made.

    Args:
        config: What was asked for.
        spec: The model.
        mesh: The devices, which may be abstract.
        device_memory_bytes: Memory of one device; asked of the device itself if None.

    Raises:
        ConfigError: The settings contradict each other, the model, or the memory there is.
    """
    device = mesh.devices.flat[0]
    require_attention(config, device.platform)
    repeat = kv_repeat(spec.num_heads, spec.num_kv_heads, mesh)
    guess = jnp.dtype(config.dtype or auto_dtype(device.platform, spec.dtype))
    blueprint = Blueprint.of(
        spec,
        dtype=guess,
        quantization=config.quantization,
        mesh=mesh,
        kv_repeat=repeat,
        backend=None if config.attention is None else Backend(config.attention),
    )
    pool_dtype = storage_dtype(config.kv_cache_dtype or guess.name, device.platform)
    heads = (spec.num_kv_heads * repeat, spec.head_dim)
    if Backend.TPU in (device.platform, config.attention):
        heads = held_heads(*heads, pool_dtype, num_shards=mesh.shape[TENSOR])
    page = PoolLayout(
        num_layers=spec.num_layers, num_pages=1, page_size=1, num_kv_heads=heads[0], head_dim=heads[1], dtype=pool_dtype
    )
    resolved = resolve(
        config,
        Facts(
            platform=device.platform,
            max_position=spec.max_position,
            default_max_len=spec.default_max_len,
            checkpoint_dtype=spec.dtype,
            device_memory_bytes=device_memory_bytes or _device_memory_bytes(device),
            weight_bytes=weight_bytes(blueprint.params(), mesh),
            kv_bytes_per_token=page.device_bytes(mesh),
        ),
    )
    layout = replace(page, num_pages=resolved.num_pages, page_size=resolved.page_size)
    _require_numbers(layout, spec)
    _tell_scaling(spec, resolved)
    limits = SamplingLimits(
        vocab_size=spec.vocab_size, max_model_len=resolved.max_model_len, eos_token_ids=spec.eos_token_ids
    )
    buckets = Buckets(tokens=resolved.token_buckets, seqs=resolved.seq_buckets)
    replica = Replica(
        blueprint=blueprint,
        layout=layout,
        limits=limits,
        buckets=buckets,
        mesh=mesh,
    )
    return replica, resolved


def _require_numbers(layout: PoolLayout, spec: ModelSpec) -> None:
    if len(spec.eos_token_ids) > MAX_STOP_IDS:
        raise CheckpointError(
            f"The model has {len(spec.eos_token_ids)} end-of-sequence tokens; at most {MAX_STOP_IDS} are supported."
        )
    if layout.shape[0] > _MAX_PAGES:
        raise ConfigError(
            f"num_pages={layout.num_pages} is too many: {layout.num_layers} layers have room for "
            f"{_MAX_PAGES // layout.num_layers} each, for the pages of all have numbers of 32 bits; lower it.",
            param="num_pages",
        )


def _tell_scaling(spec: ModelSpec, resolved: ResolvedConfig) -> None:
    if resolved.max_model_len > spec.default_max_len:
        logger.warning(
            "max_model_len=%d is beyond the %d tokens that the model was trained with: positions of all requests are "
            "scaled, those of short ones too",
            *(resolved.max_model_len, spec.default_max_len),
        )


def build_engine(
    config: ServeConfig,
    model: Model,
    *,
    observer: StepObserver | None = None,
    progress: Progress | None = None,
    shares: Mapping[str, float] | None = None,
) -> LocalEngine:
    """Loads the parameters, compiles every program or takes it from a bundle, and starts the loop.

    Args:
        config: What to serve and how.
        model: What `find_model` found.
        observer: Is told about each step.
        progress: Is told how far loading and compiling are.
        shares: Client to its share of the service; 1 for those not named.

    Raises:
        ConfigError: The settings cannot be served, or the bundle is not for them.
        CheckpointError: The weights cannot be loaded.
    """
    started = time.monotonic()
    bundle = _open(config)
    if bundle is not None:
        config = bundle.adopt(config)
    shape = config.mesh
    mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor)
    if bundle is not None:
        bundle.require(model.spec, mesh)
    if config.compilation_cache:
        _keep_programs(config.cache_dir or cache_dir())
    replica, resolved = plan_replica(config, model.spec, mesh)
    params, executables = load_and_compile(model.source, model.spec, replica, config, bundle, progress)
    with _room_for_pool(replica):
        runner = DeviceRunner(replica, params, executables)
        runner.warm_up()
    release_free_memory()
    counter = CompileCounter()
    counter.start()
    engine = LocalEngine(
        new_scheduler(resolved, model.spec.eos_token_ids, shares),
        runner,
        info=EngineInfo(
            model=model.name,
            max_model_len=resolved.max_model_len,
            vocab_size=model.spec.vocab_size,
            page_size=resolved.page_size,
            num_pages=resolved.num_pages,
            eos_token_ids=model.spec.eos_token_ids,
            max_num_seqs=resolved.max_num_seqs,
        ),
        limits=replica.limits,
        observer=observer,
        num_compiles=lambda: counter.count,
        watchdog=Watchdog(config.step_timeout_s),
    )
    logger.info(
        "ready after %.1f s: %d programs, %d pages", time.monotonic() - started, len(executables), resolved.num_pages
    )
    return engine


def _keep_programs(folder: Path | None) -> None:
    """Keeps compiled programs in a cache directory, if there is one."""
    if folder is None:
        logger.warning(
            "compiled programs are not kept, for there is no home directory; name a folder with --cache-dir or "
            "JAXSERVE_CACHE"
        )
    else:
        enable_persistent_cache(folder / "programs")


def _open(config: ServeConfig) -> Bundle | None:
    """The bundle that was asked for."""
    key = read_key(config.bundle_key)
    if config.bundle is None:
        if key is not None:
            raise ConfigError(
                "--bundle-key checks the bundle that --bundle names, and none is named; give both or neither.",
                param="bundle_key",
            )
        return None
    return open_bundle(config.bundle, key)


def new_scheduler(
    resolved: ResolvedConfig, eos_token_ids: tuple[int, ...], shares: Mapping[str, float] | None = None
) -> Scheduler:
    """A scheduler and its page table, as configured."""
    kv = KVManager(
        num_pages=resolved.num_pages,
        page_size=resolved.page_size,
        enable_prefix_cache=resolved.asked.enable_prefix_caching,
    )
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            max_model_len=resolved.max_model_len,
            max_waiting=resolved.asked.max_waiting,
            long_prefill_token_threshold=resolved.long_prefill_token_threshold,
            token_buckets=resolved.token_buckets,
            fairness=FairnessConfig(shares=shares or {}),
        ),
        kv,
        eos_token_ids,
        random=Random(resolved.asked.seed),
    )


@contextmanager
def _room_for_pool(replica: Replica) -> Iterator[None]:
    """Where the KV pool is made: that there is no memory for it is the configuration's fault.

    Raises:
        ConfigError: There is none.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = replica.layout.device_bytes(replica.mesh) / (1 << 30)
        raise ConfigError(
            f"A device has no room for {needed:.1f} GiB of KV cache beside the weights "
            f"({str(error).splitlines()[0]}); lower num_pages={replica.layout.num_pages} or memory_fraction.",
            param="num_pages",
        ) from error


def _device_memory_bytes(device: jax.Device) -> int | None:
    stats = device.memory_stats()
    return None if not stats else stats.get("bytes_limit")
