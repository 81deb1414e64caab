"""What "auto" means: settings, platform and model to the shapes of a replica.

`resolve` is called once; afterwards nothing says "auto". Pure arithmetic: no device is asked anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import ConfigError

MIB = 1 << 20

ACCELERATOR_SEQS = 256
"""Sequences that run at once on an accelerator by default."""

ACCELERATOR_TOKENS = 1024
"""Tokens that a step computes on an accelerator by default: two to six times what keeps its matmuls busy while weights
are read. More makes decodes wait for longer prefills, and its programs are the slowest to compile."""

MEMORY_FRACTION = 0.9
"""Share of a device's memory that weights and pool take together by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What `resolve` needs to know.

    Attributes:
        platform: JAX's name of the platform: "cpu", "gpu", "tpu".
        max_position: Longest context the model can be served with.
        default_max_len: Longest context it is served with unless a longer one is asked for.
        checkpoint_dtype: Dtype the checkpoint is stored in.
        device_memory_bytes: Memory of one device, or None where nothing limits us.
        weight_bytes: Weights a device holds.
        kv_bytes_per_token: KV cache a token takes on a device, over all layers.
    """

    platform: str
    max_position: int
    default_max_len: int
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


def resolve(asked: ServeConfig, facts: Facts) -> ResolvedConfig:
    """Answers every "auto".

    Args:
        asked: The settings as given.
        facts: What is known of the platform and the model.

    Raises:
        ConfigError: The settings contradict each other, the model, or the memory there is.
    """
    on_cpu = facts.platform == "cpu"
    seqs = asked.max_num_seqs or (64 if on_cpu else ACCELERATOR_SEQS)
    batched = asked.max_num_batched_tokens or (512 if on_cpu else ACCELERATOR_TOKENS)
    if batched < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={batched} is less than max_num_seqs={seqs}: a step could not advance every "
            "sequence; raise the first or lower the second.",
            param="max_num_batched_tokens",
        )
    if asked.max_model_len is not None and asked.max_model_len > facts.max_position:
        raise ConfigError(
            f"max_model_len={asked.max_model_len} is beyond the model's {facts.max_position} positions; lower it.",
            param="max_model_len",
        )
    page_size = asked.page_size or (16 if on_cpu else 64)
    num_pages = _asked_pages(asked, facts, page_size) or _pages(asked, facts, page_size)
    longest = min(asked.max_model_len or facts.default_max_len, num_pages * page_size)
    if asked.max_model_len is not None and longest < asked.max_model_len:
        raise ConfigError(
            f"A pool of {num_pages} pages of {page_size} tokens cannot hold one sequence of max_model_len="
            f"{asked.max_model_len}; raise num_pages or memory_fraction, or lower max_model_len.",
            param="max_model_len",
        )
    dtype = asked.dtype or auto_dtype(facts.platform, facts.checkpoint_dtype)
    if on_cpu:
        # XLA multiplies one float32 row at memory speed; other matmuls want four rows to go through oneDNN.
        smallest = 1 if asked.quantization is None and dtype == "float32" else 4
        seq_buckets = _ladder(min(smallest, seqs), seqs)
        token_buckets = {*seq_buckets, *_ladder(min(64, batched), batched)}
    else:
        # Up to some 256 rows an accelerator's matmuls wait for the weights: padding is free, programs are not. The
        # decoder's rows pass between devices twice a layer, though, so few tokens get a size of their own.
        seq_buckets = _ladder(min(64, seqs), seqs, factor=4)
        token_buckets = {min(16, seqs), *seq_buckets, *_ladder(min(256, batched), batched)}
    return ResolvedConfig(
        asked=asked,
        dtype=dtype,
        kv_cache_dtype=asked.kv_cache_dtype or dtype,
        page_size=page_size,
        num_pages=num_pages,
        max_model_len=longest,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        seq_buckets=seq_buckets,
        token_buckets=tuple(sorted(token_buckets)),
        long_prefill_token_threshold=asked.long_prefill_token_threshold or max(1, batched // 2),
    )


def _asked_pages(asked: ServeConfig, facts: Facts, page_size: int) -> int | None:
    """The pages that were asked for, if the device holds them."""
    memory = facts.device_memory_bytes
    if memory is None and asked.memory_fraction is not None:
        message = "memory_fraction is a share of a device's memory, and a host's is not all ours; use --num-pages."
        raise ConfigError(message, param="memory_fraction")
    most = None if memory is None else (memory - facts.weight_bytes) // (facts.kv_bytes_per_token * page_size)
    if asked.num_pages is not None and most is not None and asked.num_pages > most:
        raise ConfigError(
            f"A device has room for {max(0, most)} pages of {page_size} tokens beside its "
            f"{facts.weight_bytes / MIB:.0f} MiB of weights, not for num_pages={asked.num_pages}; lower it.",
            param="num_pages",
        )
    return asked.num_pages


def _room(asked: ServeConfig, facts: Facts) -> int:
    """Bytes of a device that its weights leave to the pool."""
    if facts.device_memory_bytes is None:
        return 384 * MIB
    return int(facts.device_memory_bytes * (asked.memory_fraction or MEMORY_FRACTION)) - facts.weight_bytes


def _pages(asked: ServeConfig, facts: Facts, page_size: int) -> int:
    page_bytes = facts.kv_bytes_per_token * page_size
    if facts.device_memory_bytes is None:
        # Nobody says how much of a host's memory is ours: room for 16k tokens, at most 384 MiB.
        return max(1, min(16384 // page_size, _room(asked, facts) // page_bytes))
    room = _room(asked, facts)
    if room < page_bytes:
        raise ConfigError(
            f"The weights take {facts.weight_bytes / MIB:.0f} MiB a device and leave no room for KV pages; use "
            "more devices (--mesh), quantise (--quantization int8), or raise --memory-fraction.",
            param="memory_fraction",
        )
    return room // page_bytes
