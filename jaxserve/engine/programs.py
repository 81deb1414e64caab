"""The programs a replica runs, as pure functions of device state: step, admit, copy pages.

`step` is the whole model for one ragged batch: unpack, read the input tokens from the slots' histories, decode,
score, sample. Warm-up, ahead-of-time compilation and serving all lower these same functions from the same abstract
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jaxserve.core.types import SamplingParams
from jaxserve.engine.batch import Bucket, Buckets, StepInput, Unpacked, unpack
from jaxserve.kv.pool import PoolLayout, copy_pages
from jaxserve.models.decoder import Blueprint, Decoder
from jaxserve.sampling.logprobs import SampleOutput, no_logprobs, prompt_logprobs
from jaxserve.sampling.sampler import sample
from jaxserve.sampling.state import SamplingState, admission, admit, init_state
from jaxserve.sampling.validate import SamplingLimits
from jaxserve.sharding.rules import replicated, sharding_for

COPY_BATCH = 16
"""Page copies done by one launch of the copy program."""

LOGPROB_ROWS = 32
"""Prompt positions scored at once; bounds the logits in memory."""

Params: TypeAlias = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step yields."""

    # S rows; token 0 in rows that do not sample
    sampled: SampleOutput
    # T rows: how likely the prompt token after each position was; None in decode-only buckets
    prompt: SampleOutput | None


@dataclass(frozen=True, kw_only=True)
class Replica:
    """Everything that fixes a replica's programs.

    Attributes:
        blueprint: The decoder.
        layout: The KV pool.
        limits: Sizes of the sampler's state.
        buckets: The closed set of shapes.
        max_num_seqs: Slots.
        mesh: Devices.
    """

    blueprint: Blueprint
    layout: PoolLayout
    limits: SamplingLimits
    buckets: Buckets
    max_num_seqs: int
    mesh: Mesh

    @property
    def pages_per_seq(self) -> int:
        """Width of the page table."""
        return -(-self.limits.max_model_len // self.layout.page_size)

    def abstract_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters before they are loaded, with their shardings."""
        return {
            path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding_for(info.axes, info.shape, self.mesh))
            for path, info in self.blueprint.params().items()
        }

    def init_sampling(self) -> SamplingState:
        """The sampler's state with no slot taken."""
        return init_state(self.max_num_seqs, self.limits, sharding=replicated(self.mesh))

    def abstract_sampling(self) -> SamplingState:
        """The sampler's state before it exists."""
        sharding = replicated(self.mesh)
        shapes = jax.eval_shape(lambda: init_state(self.max_num_seqs, self.limits))
        state: SamplingState = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
        )
        return state


@dataclass(frozen=True, kw_only=True)
class Program:
    """A function to compile, and the abstract arguments it is compiled for.

    Attributes:
        name: As metrics and logs call it: "step", "admit" or "copy_pages".
        bucket: The shape it is for, or "-".
        function: Jitted, donating what it changes.
        args: Abstract arguments.
    """

    name: str
    bucket: str
    function: Any
    args: tuple[Any, ...]


def run_step(
    params: Params,
    kv_pages: Shaped[Array, "P page_size 2*K H"],
    state: SamplingState,
    inputs: StepInput,
    *,
    blueprint: Blueprint,
    bucket: Bucket,
) -> tuple[Array, SamplingState, StepOutput]:
    """One launch of the model over a ragged batch.

    Args:
        params: The decoder's parameters by path.
        kv_pages: The pool; donated.
        state: The sampler's state; donated.
        inputs: What the host sent.
        blueprint: How to put the decoder together.
        bucket: The static shape of `inputs`.

    Returns:
        The pool, the sampler's state, and the tokens.
    """
    model = blueprint.bind(params)
    arrays = unpack(inputs, bucket)
    batch = arrays.batch
    token_slots = arrays.slots.at[batch.token_seq].get(mode="clip")
    token_ids = state.history.at[token_slots, batch.positions].get(mode="clip")
    hidden, kv_pages = model(token_ids, kv_pages, batch)
    last = jnp.maximum(batch.query_starts[1:] - 1, 0)
    logits = model.logits(hidden.at[last].get(mode="clip"))
    prompt = None
    if bucket.num_tokens > bucket.num_seqs:
        following = state.history.at[token_slots, batch.positions + 1].get(mode="clip")
        prompt = _score_prompt(model, hidden, following, arrays)
    state, sampled = sample(logits, state, arrays.slots, batch.context_lens, arrays.samples)
    return kv_pages, state, StepOutput(sampled=sampled, prompt=prompt)


def _score_prompt(
    model: Decoder, hidden: Float[Array, "T D"], following: Int32[Array, " T"], arrays: Unpacked
) -> SampleOutput:
    """How likely each position's next prompt token was, for steps in which some sequence wants to know."""
    num_tokens = hidden.shape[0]
    rows = min(LOGPROB_ROWS, num_tokens)
    missing = -num_tokens % rows
    blocks = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, rows, hidden.shape[1])
    targets = jnp.pad(following, (0, missing)).reshape(-1, rows)
    wanted: Bool[Array, ""] = jnp.any(arrays.wants_prompt_logprobs)

    def score(_: None) -> SampleOutput:
        scored = jax.lax.map(lambda block: prompt_logprobs(model.logits(block[0]), block[1]), (blocks, targets))
        flat: SampleOutput = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_tokens], scored)
        return flat

    output: SampleOutput = jax.lax.cond(wanted, score, lambda _: no_logprobs(following), None)
    return output


def programs(replica: Replica) -> list[Program]:
    """Every program of a replica in every bucket: what must be compiled before the first request."""
    sharding = replicated(replica.mesh)
    params, pool = replica.abstract_params(), replica.layout.abstract(replica.mesh)
    state = replica.abstract_sampling()

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    out = {"kv": pool.sharding, "whole": sharding}
    steps = []
    for bucket in replica.buckets.all():
        inputs = StepInput(
            packed=ints(4 * bucket.num_seqs + 2), page_table=ints(bucket.num_seqs, replica.pages_per_seq)
        )
        function = _jit(
            partial(run_step, blueprint=replica.blueprint, bucket=bucket),
            donate=(1, 2),
            out=(out["kv"], out["whole"], out["whole"]),
        )
        steps.append(Program(name="step", bucket=bucket.name, function=function, args=(params, pool, state, inputs)))
    words = admission_words(replica)
    return [
        *steps,
        Program(
            name="admit", bucket="-", function=_jit(admit, donate=(0,), out=sharding), args=(state, ints(), ints(words))
        ),
        Program(
            name="copy_pages",
            bucket="-",
            function=_jit(partial(copy_pages, num_layers=replica.layout.num_layers), donate=(0,), out=pool.sharding),
            args=(pool, ints(COPY_BATCH), ints(COPY_BATCH)),
        ),
    ]


def admission_words(replica: Replica) -> int:
    """Length of the vector that loads a slot."""
    return int(np.size(admission(SamplingParams(), (), 0, 0, replica.limits)))


def _jit(function: Callable[..., Any], *, donate: tuple[int, ...], out: Any) -> Any:  # noqa: ANN401 - shardings are pytrees of any form
    return jax.jit(function, donate_argnums=donate, out_shardings=out)
