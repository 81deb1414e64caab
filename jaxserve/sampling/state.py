"""The sampler's device state: one row a slot, loaded once when a sequence is admitted.

On the host `admission` turns a request into one packed int32 vector (floats by their bits), so that loading a slot
moves a single small array; on the device `admit` cuts it up and writes every row of the slot, leaving nothing of its
former owner. From then on a step only appends the sampled token to the slot's history; penalties, bad words and the
next decode's input token are read from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int, Int32, UInt32

from jaxserve.core.types import SamplingParams
from jaxserve.sampling.validate import SamplingLimits, stop_ids

HostArray: TypeAlias = npt.NDArray[np.generic]

Admission: TypeAlias = npt.NDArray[np.int32]
"""One slot's state, packed: its row of each array of `SamplingState` by ascending name, every element as 32 bits."""

MIN_TEMPERATURE = 1e-5
"""Below this a request is greedy (as in vLLM): dividing by less only manufactures infinities."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Filters:
    """What shapes the distribution that a row is drawn from."""

    # [S_max]; 0 is greedy
    temperature: Float[Array, " S_max"]
    # [S_max]; 0 keeps all
    top_k: Int32[Array, " S_max"]
    # [S_max]; 1 keeps all
    top_p: Float[Array, " S_max"]
    # [S_max]; 0 keeps all
    min_p: Float[Array, " S_max"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Penalties:
    """What discourages tokens that have occurred."""

    # [S_max]; 1 is off
    repetition: Float[Array, " S_max"]
    # [S_max]; 0 is off
    frequency: Float[Array, " S_max"]
    # [S_max]; 0 is off
    presence: Float[Array, " S_max"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Constraints:
    """Which tokens a row must not take, or takes more or less readily."""

    # [S_max]; before this position stop ids are banned
    min_len: Int32[Array, " S_max"]
    # [S_max, max_stop_ids]; -1 is padding
    stop_ids: Int32[Array, "S_max max_stop"]
    # [S_max, max_bias_ids]; -1 is padding
    bias_ids: Int32[Array, "S_max max_bias"]
    # [S_max, max_bias_ids]
    bias_values: Float[Array, "S_max max_bias"]
    # [S_max]; 1 if `allowed` counts, 0 if every token may be taken
    restricted: Int32[Array, " S_max"]
    # [S_max, ceil(V / 32)]; bit v % 32 of word v // 32 says whether token v may be taken
    allowed: UInt32[Array, "S_max words"]
    # [S_max, max_bad_words, max_bad_word_len]; right-aligned, -1 on the left of a word and in absent words
    bad_words: Int32[Array, "S_max max_bad max_bad_len"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Everything the sampler knows about the sequences in the engine's slots."""

    # [S_max, L_max]; token ids by position; what lies beyond the sequence's length is never read
    history: Int32[Array, "S_max L_max"]
    # [S_max]; tokens of `history` that are prompt, not output
    prompt_len: Int32[Array, " S_max"]
    # [S_max, 2]; threefry key data of the sequence's seed
    key: UInt32[Array, "S_max 2"]
    # [S_max]; alternatives to report a token, -1 for no logprobs at all
    num_logprobs: Int32[Array, " S_max"]
    filters: Filters
    penalties: Penalties
    constraints: Constraints


def init_state(
    max_num_seqs: int, limits: SamplingLimits, *, sharding: jax.sharding.Sharding | None = None
) -> SamplingState:
    """The state of an engine in which no slot is taken.

    Args:
        max_num_seqs: How many slots there are.
        limits: Fixes the other shapes.
        sharding: Where the arrays live; every array is replicated, so one sharding serves all.
    """
    row = _row(SamplingParams(), (), 0, 0, limits)
    rows = {name: np.broadcast_to(leaf, (max_num_seqs, *leaf.shape)) for name, leaf in row.items()}
    return _from_names({name: jax.device_put(leaf, sharding) for name, leaf in rows.items()})


def admission(
    params: SamplingParams, token_ids: Sequence[int], num_prompt: int, seed: int, limits: SamplingLimits
) -> Admission:
    """Packs what the sampler must know about a sequence that takes a slot.

    Args:
        params: How the sequence samples; has passed `validate_sampling`.
        token_ids: The prompt, followed by the output so far when the sequence resumes after a preemption.
        num_prompt: How many of them are prompt.
        seed: Seed of this very sequence; any integer (its low 64 bits count).
        limits: The limits the state was made with.

    Returns:
        One int32 vector for `admit`.
    """
    row = _row(params, token_ids, num_prompt, seed, limits)
    return np.concatenate([_to_words(row[name]) for name in sorted(row)])


def admit(state: SamplingState, slot: Int[Array, ""], packed: Int32[Array, " R"]) -> SamplingState:
    """Writes an admission into a slot; every row of the slot is overwritten. Jit with `state` donated.

    Args:
        state: The state of all slots.
        slot: Scalar; which slot.
        packed: From `admission`.

    Returns:
        The new state.
    """
    named = _by_name(state)
    start = 0
    for name in sorted(named):
        leaf = named[name]
        size = math.prod(leaf.shape[1:])
        words = packed[start : start + size].reshape(leaf.shape[1:])
        named[name] = leaf.at[slot].set(_from_words(words, leaf.dtype))
        start += size
    if start != packed.shape[0]:
        raise ValueError(f"the admission has {packed.shape[0]} words; this state's rows have {start}")
    return _from_names(named)


def _by_name(state: SamplingState) -> dict[str, Array]:
    """The arrays of a state by field name; names are unique over the nested classes."""
    return {path[-1].name: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _from_names(arrays: Mapping[str, Array]) -> SamplingState:
    def part(cls: type[Filters | Penalties | Constraints]) -> dict[str, Array]:
        return {field.name: arrays[field.name] for field in dataclasses.fields(cls)}

    return SamplingState(
        history=arrays["history"],
        prompt_len=arrays["prompt_len"],
        key=arrays["key"],
        num_logprobs=arrays["num_logprobs"],
        filters=Filters(**part(Filters)),
        penalties=Penalties(**part(Penalties)),
        constraints=Constraints(**part(Constraints)),
    )


def _row(
    params: SamplingParams, token_ids: Sequence[int], num_prompt: int, seed: int, limits: SamplingLimits
) -> dict[str, HostArray]:
    """One slot's state by field name, without the leading slot dimension."""
    history = np.zeros(limits.max_model_len, np.int32)
    history[: len(token_ids)] = token_ids
    waits = params.min_tokens > 0
    return {
        "history": history,
        "prompt_len": np.array(num_prompt, np.int32),
        "key": np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
        "num_logprobs": np.array(-1 if params.logprobs is None else params.logprobs, np.int32),
        "temperature": np.array(params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0, np.float32),
        "top_k": np.array(min(params.top_k, limits.vocab_size), np.int32),
        "top_p": np.array(params.top_p, np.float32),
        "min_p": np.array(params.min_p, np.float32),
        "repetition": np.array(params.repetition_penalty, np.float32),
        "frequency": np.array(params.frequency_penalty, np.float32),
        "presence": np.array(params.presence_penalty, np.float32),
        "min_len": np.array(num_prompt + params.min_tokens if waits else 0, np.int32),
        "stop_ids": _padded(stop_ids(params, limits.eos_token_ids) if waits else (), limits.max_stop_ids),
        "bias_ids": _padded(tuple(params.logit_bias), limits.max_bias_ids),
        "bias_values": _padded(tuple(params.logit_bias.values()), limits.max_bias_ids, np.float32, 0),
        "restricted": np.array(params.allowed_token_ids is not None, np.int32),
        "allowed": _bitmask(params.allowed_token_ids, limits.vocab_size),
        "bad_words": _right_aligned(params.bad_words, limits.max_bad_words, limits.max_bad_word_len),
    }


def _padded(values: Sequence[float], size: int, dtype: npt.DTypeLike = np.int32, fill: int = -1) -> HostArray:
    padded = np.full(size, fill, dtype)
    padded[: len(values)] = values
    return padded


def _right_aligned(words: Sequence[Sequence[int]], num_words: int, length: int) -> HostArray:
    aligned = np.full((num_words, length), -1, np.int32)
    for i, word in enumerate(words):
        aligned[i, length - len(word) :] = word
    return aligned


def _bitmask(ids: Sequence[int] | None, vocab_size: int) -> HostArray:
    if ids is None:
        return np.zeros(-(-vocab_size // 32), np.uint32)
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[np.asarray(ids)] = True
    # Little-endian by definition, whatever the host is.
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _to_words(leaf: HostArray) -> Admission:
    return leaf.reshape(-1).view(np.int32)


def _from_words(words: Int32[Array, " *shape"], dtype: jnp.dtype) -> Array:
    return jax.lax.bitcast_convert_type(words, dtype)
