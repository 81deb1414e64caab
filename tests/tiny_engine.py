"""A real engine small enough for tests: a random Llama of two layers, compiled once and served in many ways.

`compiled` makes the programs and parameters of a model and keeps them for the session. `start` puts a fresh scheduler,
runner and loop on top, with a page pool, token budget or queue as small as a test wants: all of that is host
bookkeeping below the compiled shapes, so nothing is compiled again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxserve.checkpoint.random import random_params
from jaxserve.core.config import MeshShape, ServeConfig
from jaxserve.core.resolution import ResolvedConfig
from jaxserve.core.types import Request, TokenEvent
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.compile import CompileCounter, Executables, compile_programs
from jaxserve.engine.loop import LocalEngine, StepObserver
from jaxserve.engine.programs import Replica, programs
from jaxserve.engine.runner import DeviceRunner, Runner
from jaxserve.engine.scheduler import Scheduler
from jaxserve.launch.build import new_scheduler, plan_replica
from jaxserve.models.decoder import Blueprint
from jaxserve.models.spec import Activation, ModelSpec, RopeSpec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import sharding_for

EOS = 1
# The vocabulary is that of the server tests' tokenizer.
SPEC = ModelSpec(
    family="llama",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=96,
    vocab_size=260,
    max_position=256,
    norm_eps=1e-5,
    rope=RopeSpec(theta=10000.0, scaling=None),
    activation=Activation.SILU,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_embeddings=False,
    sliding_window=None,
    attention_soft_cap=None,
    logit_soft_cap=None,
    bos_token_id=None,
    eos_token_ids=(EOS,),
    dtype="float32",
)
CONFIG = ServeConfig(
    model="tiny",
    dtype="float32",
    page_size=4,
    num_pages=512,
    max_num_seqs=16,
    max_num_batched_tokens=64,
    max_model_len=128,
)


@dataclass(frozen=True)
class Compiled:
    """A model that is ready to be served.

    Attributes:
        replica: What fixes its programs.
        resolved: Its configuration.
        params: Its parameters.
        executables: Its programs.
    """

    replica: Replica
    resolved: ResolvedConfig
    params: Mapping[str, jax.Array]
    executables: Executables


@functools.cache
def compiled(spec: ModelSpec = SPEC, config: ServeConfig = CONFIG) -> Compiled:
    """Compiles a model with random weights; the same function of the tokens on every mesh."""
    shape = config.mesh
    mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor)
    replica, resolved = plan_replica(config, spec, mesh)
    return Compiled(
        replica=replica,
        resolved=resolved,
        params=placed(spec, replica),
        executables=compile_programs(programs(replica), num_threads=2),
    )


def placed(spec: ModelSpec, replica: Replica) -> dict[str, jax.Array]:
    """Random parameters on the replica's mesh, each KV head repeated as the replica wants it."""
    single = make_mesh(devices=jax.devices()[:1])
    infos = replica.blueprint.params()
    repeat = replica.layout.num_kv_heads // spec.num_kv_heads
    plain = Blueprint.of(spec, dtype=replica.blueprint.dtype, quantization=_quantization(replica)).params()
    weights = random_params(spec, plain, mesh=single)
    moved = {}
    for path, info in infos.items():
        value = repeat_kv_heads(path, np.asarray(weights[path]), spec, repeat)
        assert value.shape == info.shape
        moved[path] = jax.device_put(value, sharding_for(info.axes, info.shape, replica.mesh))
    return moved


def _quantization(replica: Replica) -> str | None:
    return "int8" if "embed.scale" in replica.blueprint.params() else None


def repeat_kv_heads(path: str, value: np.ndarray, spec: ModelSpec, repeat: int) -> np.ndarray:
    """The parameter of a model whose KV heads stand `repeat` times in a row; the model computes the same."""
    if repeat == 1:
        return value
    group = spec.q_per_kv
    if path.startswith("layers.attn.qkv."):
        # [..., K, G + 2, H]: each copy keeps its share of the query heads, and a copy of key and value.
        queries, shared = value[..., :group, :], value[..., group:, :]
        copies = [np.concatenate([part, shared], -2) for part in np.split(queries, repeat, axis=-2)]
        stacked = np.stack(copies, axis=-3)
        return stacked.reshape(*value.shape[:-3], spec.num_kv_heads * repeat, group // repeat + 2, spec.head_dim)
    if path == "layers.attn.out.kernel":
        layers, kv_heads, _, head_dim, width = value.shape
        return value.reshape(layers, kv_heads * repeat, group // repeat, head_dim, width)
    return value


def new_runner(model: Compiled) -> DeviceRunner:
    """A runner of its own copy of the parameters, for it takes them."""
    params = {path: model.replica.hold(path, value.copy(), model.executables) for path, value in model.params.items()}
    return DeviceRunner(model.replica, params, model.executables)


def start(
    model: Compiled,
    *,
    runner: Runner | None = None,
    scheduler: Scheduler | None = None,
    observer: StepObserver | None = None,
    counter: CompileCounter | None = None,
    **limits: Any,
) -> LocalEngine:
    """A fresh engine.

    Args:
        model: What it serves.
        runner: Stands in for the model's own.
        scheduler: Stands in for a new one.
        observer: Is told about each step.
        counter: Counts compilations.
        limits: Fields of the resolved configuration to make smaller: num_pages, max_num_batched_tokens,
            max_num_seqs, long_prefill_token_threshold; and of the one asked for: max_waiting, enable_prefix_caching.
    """
    asked = {name: limits.pop(name) for name in ("max_waiting", "enable_prefix_caching") if name in limits}
    resolved = replace(model.resolved, asked=replace(model.resolved.asked, **asked), **limits)
    spec = model.replica.blueprint.spec
    return LocalEngine(
        scheduler or new_scheduler(resolved, spec.eos_token_ids),
        runner or new_runner(model),
        info=EngineInfo(
            model="tiny",
            max_model_len=resolved.max_model_len,
            vocab_size=spec.vocab_size,
            page_size=resolved.page_size,
            num_pages=resolved.num_pages,
            eos_token_ids=spec.eos_token_ids,
            max_num_seqs=resolved.max_num_seqs,
        ),
        limits=model.replica.limits,
        observer=observer,
        num_compiles=lambda: counter.count if counter is not None else 0,
    )


@asynccontextmanager
async def serving(engine: LocalEngine) -> AsyncIterator[LocalEngine]:
    """Closes the engine at the end, after checking its books if it is well."""
    try:
        yield engine
        await asyncio.to_thread(check_books, engine)
    finally:
        await engine.close()


def check_books(engine: LocalEngine) -> None:
    """Nothing waits or runs, and every page is accounted for."""
    with engine._work:
        engine._scheduler.check_integrity()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.kv_cache_usage) == (0, 0, 0)


async def generate(engine: LocalEngine, request: Request) -> list[TokenEvent]:
    return [event async for event in engine.stream(request)]


async def generate_all(
    engine: LocalEngine, requests: Sequence[Request], *, concurrently: bool = True
) -> list[list[TokenEvent]]:
    """Events of each request, run one after another or all at once: no step runs before the last is submitted."""
    if concurrently:
        with engine._work:
            streams = [engine.stream(request) for request in requests]
        return await asyncio.gather(*(_drained(stream) for stream in streams))
    return [await generate(engine, request) for request in requests]


async def _drained(stream: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in stream]


def tokens_by_index(events: Sequence[TokenEvent]) -> dict[int, list[int]]:
    """Tokens of each of a request's sequences."""
    tokens: dict[int, list[int]] = {}
    for event in events:
        tokens.setdefault(event.index, []).extend(event.token_ids)
    return dict(sorted(tokens.items()))


@contextlib.contextmanager
def counting(counter: CompileCounter) -> Iterator[None]:
    """Counts compilations within; begin once the engine is ready."""
    counter.start()
    try:
        yield
    finally:
        counter.stop()


SMALL = replace(CONFIG, max_num_seqs=8, max_num_batched_tokens=32)
"""Fewer programs, for models that a few tests use."""


def on_mesh(config: ServeConfig, *, tensor: int) -> ServeConfig:
    return replace(config, mesh=MeshShape(tensor=tensor))
