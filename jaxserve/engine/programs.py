"""The programs a replica runs, as pure functions of device state.

A step is two of them: `decode` runs the model over a ragged batch of T tokens and keeps each sequence's last hidden
state; `head` scores the first S of those and samples. `score` says how likely prompt tokens were, for steps in which
somebody asks. `admit` loads a slot, `copy_pages` copies on write, `allocate` makes the pool, and `hold` gives a loaded
parameter the dtype and order that programs take. Ahead-of-time compilation and serving lower these same functions from
the same abstract arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Shaped

from jaxserve.core.types import SamplingParams
from jaxserve.engine.batch import Buckets, StepInput, unpack, unpack_rows
from jaxserve.kv.pool import PoolLayout, copy_pages
from jaxserve.models.decoder import STACK, Blueprint
from jaxserve.models.params import Held
from jaxserve.quant.bits import storage_dtype, to_storage
from jaxserve.sampling.logprobs import SampleOutput, prompt_logprobs
from jaxserve.sampling.sampler import sample
from jaxserve.sampling.state import SamplingState, admission, admit, init_state
from jaxserve.sampling.validate import SamplingLimits
from jaxserve.sharding.rules import replicated, sharding_for

COPY_BATCH = 16
"""Page copies done by one launch of the copy program."""

SCORED_ROWS = 32
"""Prompt positions scored at once; bounds the logits in memory."""

Params: TypeAlias = Mapping[str, Held]
AbstractHeld: TypeAlias = jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]
"""A `Held` before it exists."""

Key: TypeAlias = tuple[str, int]
"""A program's name and its bucket (0 for programs of one shape)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What `decode` hands on."""

    # [S_max, D]; hidden state of each sequence's last token, zeros for padding
    last: Float[Array, "S_max D"]
    # [T, D]; hidden state of every token
    hidden: Float[Array, "T D"]
    # [T]; the token that follows in the sequence's history, where there is one
    following: Int32[Array, " T"]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """Everything that fixes a replica's programs.

    Attributes:
        blueprint: The decoder.
        layout: The KV pool.
        limits: Sizes of the sampler's state.
        buckets: The closed set of shapes.
        mesh: Devices.
    """

    blueprint: Blueprint
    layout: PoolLayout
    limits: SamplingLimits
    buckets: Buckets
    mesh: Mesh

    @property
    def max_num_seqs(self) -> int:
        """Slots."""
        return self.buckets.seqs[-1]

    @property
    def pages_per_seq(self) -> int:
        """Width of the page table."""
        return -(-self.limits.max_model_len // self.layout.page_size)

    def abstract_params(self) -> dict[str, AbstractHeld]:
        """The parameters as programs take them, with shardings; the stacked ones are held as `quant/bits` says."""
        platform = self.mesh.devices.flat[0].platform
        structs = {}
        for path, info in self.blueprint.params().items():
            stacked = info.axes[0] == STACK
            dtype = storage_dtype(info.dtype.name, platform) if stacked else info.dtype
            dims = info.turned or range(len(info.shape))
            apart = stacked and self.blueprint.layers_apart
            shape = tuple(info.shape[dim] for dim in dims[apart:])
            sharding = sharding_for([info.axes[dim] for dim in dims[apart:]], shape, self.mesh)
            # On a TPU any other order would be changed to this one in every layer of every step.
            order = info.order if platform == "tpu" else None
            place = sharding if order is None else Format(Layout(order), sharding)
            struct = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            structs[path] = (struct,) * info.shape[0] if apart else struct
        return structs

    def loaded_otherwise(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those parameters that are loaded in another form than programs take, as they are loaded."""
        infos = self.blueprint.params()
        return {
            path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding_for(info.axes, info.shape, self.mesh))
            for path, held in self.abstract_params().items()
            if (info := infos[path]).turned is not None
            or isinstance(held, tuple)
            or held.dtype != info.dtype
            or _is_pinned(held)
        }

    def hold(self, path: str, loaded: Array, executables: Mapping[Key, Any]) -> Held:
        """A loaded parameter as programs take it; in another form it is deleted.

        Held as they are loaded, largest first, parameters take little more memory than the model at any time.

        Args:
            path: The parameter's.
            loaded: The parameter.
            executables: The compiled "hold" programs, at least.
        """
        holder = self.holders().get(path)
        if holder is None:
            return loaded
        held: Held = executables[holder.key](loaded)
        # What is written into new memory has not given the old back, and nothing is gained by queueing up more.
        jax.block_until_ready(held)
        loaded.delete()
        return held

    def holders(self) -> dict[str, Program]:
        """A program for each parameter that is loaded otherwise than programs take it, by its path."""
        wanted, infos = self.abstract_params(), self.blueprint.params()
        result = {}
        options = compiler_options(self.mesh.devices.flat[0])
        for index, (path, struct) in enumerate(self.loaded_otherwise().items()):
            held, turned = wanted[path], infos[path].turned
            apart = isinstance(held, tuple)
            one = held[0] if isinstance(held, tuple) else held
            pinned = _is_pinned(one)
            function = _jit(
                partial(_held, dtype=one.dtype, turned=turned, apart=apart),
                donate=() if pinned or turned or apart else (0,),
                out=one.format if pinned else one.sharding,
            )
            result[path] = Program(key=("hold", index), function=function, args=(struct,), options=options)
        return result

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
        key: Its name and bucket.
        function: Jitted, donating what it changes.
        args: Abstract arguments.
        options: What the compiler is told besides its flags.
    """

    key: Key
    function: Any
    args: tuple[Any, ...]
    options: Mapping[str, bool | str] = field(default_factory=dict)

    def lower(self) -> jax.stages.Lowered:
        """Traces the function for its arguments."""
        lowered: jax.stages.Lowered = self.function.lower(*self.args)
        return lowered


def decode(
    params: Params,
    kv_pages: Shaped[Array, "P page_size K2 H"],
    history: Int32[Array, "S_max L_max"],
    inputs: StepInput,
    *,
    blueprint: Blueprint,
    num_tokens: int,
    max_len: int,
) -> tuple[Array, Decoded]:
    """Runs the model over a ragged batch.

    Args:
        params: The decoder's parameters by path.
        kv_pages: The pool; donated.
        history: Each slot's tokens by position.
        inputs: What the host sent.
        blueprint: How to put the decoder together.
        num_tokens: T.
        max_len: Longest sequence that is served, in tokens.
    """
    packed, table = jnp.asarray(inputs.packed), jnp.asarray(inputs.page_table)
    batch = unpack(packed, table, num_tokens)
    max_num_seqs = history.shape[0]
    rows = unpack_rows(packed, table.shape[0])
    token_slots = rows.slots.at[batch.token_seq].get(mode="clip")
    token_ids = history.at[token_slots, batch.positions].get(mode="clip")
    hidden, kv_pages = blueprint.bind(params)(token_ids, kv_pages, batch, max_len=max_len)
    ends = batch.query_starts[1:]
    last = jnp.where((rows.query_lens > 0)[:, None], hidden.at[ends - 1].get(mode="clip"), 0)
    return kv_pages, Decoded(
        last=jnp.pad(last, ((0, max_num_seqs - last.shape[0]), (0, 0))),
        hidden=hidden,
        following=history.at[token_slots, batch.positions + 1].get(mode="clip"),
    )


def head(
    params: Params,
    state: SamplingState,
    last: Float[Array, "S_max D"],
    packed: Int32[Array, " packed"],
    *,
    blueprint: Blueprint,
    num_seqs: int,
) -> tuple[SamplingState, SampleOutput]:
    """Scores the first S sequences of a step and samples a token for each that wants one.

    Args:
        params: The decoder's parameters by path.
        state: The sampler's state; donated.
        last: From `decode`.
        packed: What the host sent.
        blueprint: How to put the decoder together.
        num_seqs: S.
    """
    rows = unpack_rows(jnp.asarray(packed), num_seqs)
    logits = blueprint.bind(params).logits(last[:num_seqs])
    return sample(logits, state, rows.slots, rows.context_lens, rows.samples)


def score(
    params: Params, hidden: Float[Array, "T D"], following: Int32[Array, " T"], *, blueprint: Blueprint
) -> SampleOutput:
    """How likely the token after each of a step's positions was.

    Args:
        params: The decoder's parameters by path.
        hidden: From `decode`.
        following: From `decode`.
        blueprint: How to put the decoder together.
    """
    model = blueprint.bind(params)
    num_tokens = hidden.shape[0]
    rows = min(SCORED_ROWS, num_tokens)
    missing = -num_tokens % rows
    blocks = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, rows, hidden.shape[1])
    targets = jnp.pad(following, (0, missing)).reshape(-1, rows)
    scored = jax.lax.map(lambda block: prompt_logprobs(model.logits(block[0]), block[1]), (blocks, targets))
    flat: SampleOutput = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_tokens], scored)
    return flat


def programs(replica: Replica) -> list[Program]:
    """Every program of a replica in every bucket: what must be compiled before the first request.

    The slowest to compile come first.
    """
    whole = replicated(replica.mesh)
    params, pool = replica.abstract_params(), replica.layout.abstract(replica.mesh)
    held = replica.layout.format(replica.mesh)
    state = replica.abstract_sampling()
    blueprint, buckets = replica.blueprint, replica.buckets
    width = blueprint.spec.hidden_size

    def array(*shape: int, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype or jnp.int32, sharding=whole)

    packed = array(4 * replica.max_num_seqs + 2)
    result = []
    for size in buckets.seqs:
        function = _jit(partial(head, blueprint=blueprint, num_seqs=size), donate=(1,), out=whole)
        last = array(replica.max_num_seqs, width, dtype=blueprint.dtype)
        result.append(Program(key=("head", size), function=function, args=(params, state, last, packed)))
    for size in buckets.tokens:
        inputs = StepInput(packed=packed, page_table=array(buckets.rows_for(size), replica.pages_per_seq))
        decoder = partial(decode, blueprint=blueprint, num_tokens=size, max_len=replica.limits.max_model_len)
        function = _jit(decoder, donate=(1,), out=(held, whole))
        result.append(Program(key=("decode", size), function=function, args=(params, pool, state.history, inputs)))
    for size in buckets.tokens:
        hidden = array(size, width, dtype=blueprint.dtype)
        function = _jit(partial(score, blueprint=blueprint), donate=(), out=whole)
        result.append(Program(key=("score", size), function=function, args=(params, hidden, array(size))))
    row = array(int(np.size(admission(SamplingParams(), (), 0, 0, replica.limits))))
    result.append(Program(key=("admit", 0), function=_jit(admit, donate=(0,), out=whole), args=(state, array(), row)))
    copies = array(COPY_BATCH)
    copy = partial(copy_pages, num_layers=replica.layout.num_layers, mesh=replica.mesh)
    function = _jit(copy, donate=(0,), out=held)
    result.append(Program(key=("copy_pages", 0), function=function, args=(pool, copies, copies)))
    result.append(Program(key=("allocate", 0), function=_jit(replica.layout.zeros, donate=(), out=held), args=()))
    options = compiler_options(replica.mesh.devices.flat[0])
    return [*(replace(program, options=options) for program in result), *replica.holders().values()]


def compiler_options(device: jax.Device) -> Mapping[str, bool | str]:
    """What the compiler is told of a device.

    On v7x, libtpu (0.0.51) lays 16-bit operands of matmuls out in tiles twice as tall as those that arguments have, and
    so begins every step with a copy of all weights. It is told not to. For a GPU, XLA makes matmuls twice rather than
    keep a result of kilobytes when arguments fill most of the memory, which here they always do.
    """
    if device.device_kind.startswith("TPU7"):
        return MappingProxyType({"xla_tpu_control_large_2nd_minor_layout_for_x16": False})
    if device.platform == "gpu":
        return MappingProxyType({"xla_disable_hlo_passes": "rematerialization"})
    return MappingProxyType({})


def _is_pinned(held: jax.ShapeDtypeStruct) -> bool:
    """Whether its order in memory is ours to say."""
    return isinstance(held.format.layout, Layout)


def _held(value: Array, *, dtype: jnp.dtype, turned: tuple[int, ...] | None, apart: bool) -> Held:
    """A loaded parameter as programs take it."""
    value = to_storage(value if turned is None else jnp.transpose(value, turned), dtype)
    return tuple(value) if apart else value


def _jit(function: Callable[..., Any], *, donate: tuple[int, ...], out: Any) -> Any:  # noqa: ANN401 - shardings are pytrees of any form
    return jax.jit(function, donate_argnums=donate, out_shardings=out)
