"""Weights and programs of a replica at the same time: weights load on one thread while programs compile on others.

Both need only the abstract parameters. Programs that give a parameter its form come first, for each loaded one waits
for its own. What fails on one side ends the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from jaxtyping import Array

from jaxserve.checkpoint.loader import Hold
from jaxserve.checkpoint.sources import CheckpointSource, SourceKind, load_params
from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.compile import Executables, Progress, compile_holders, compile_programs, compiles_at_once
from jaxserve.engine.programs import Replica, programs
from jaxserve.launch.bundle import Bundle
from jaxserve.models.params import Held
from jaxserve.models.spec import ModelSpec


def load_weights(
    source: CheckpointSource,
    spec: ModelSpec,
    replica: Replica,
    hold: Hold,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mapping[str, Held]:
    """The parameters of a replica, on its devices, as its programs take them.

    Args:
        source: The model.
        spec: Its mathematics.
        replica: The shapes and the devices.
        hold: Gives each parameter that form.
        seed: Of random weights.
        progress: Told about bytes of parameters.

    Raises:
        CheckpointError: The weights cannot be loaded.
    """
    return load_params(
        source, spec, replica.blueprint.params(), mesh=replica.mesh, seed=seed, hold=hold, progress=progress
    )


def load_and_compile(
    source: CheckpointSource,
    spec: ModelSpec,
    replica: Replica,
    config: ServeConfig,
    bundle: Bundle | None,
    progress: Progress | None,
) -> tuple[Mapping[str, Held], Executables]:
    """Loads the parameters, and compiles every program or takes it from a bundle.

    Args:
        source: The model.
        spec: Its mathematics.
        replica: The shapes and the devices.
        config: What was asked for.
        bundle: Executables; None compiles them.
        progress: Told how far both are.

    Raises:
        ConfigError: The attention asked for cannot do this, or the bundle is for something else.
        CheckpointError: The weights cannot be loaded.
    """
    load = partial(load_weights, source, spec, replica, seed=config.seed, progress=progress)
    with attention_as_asked(config):
        # Random weights are made by programs, too.
        if bundle is None and source.kind is SourceKind.RANDOM and _compiles_at_once(replica) == 1:
            holders = compile_holders(replica)
            params = load(partial(replica.hold, executables=holders))
            return params, _compile_others(replica, holders, progress)
        return _at_the_same_time(load, replica, config, bundle, progress)


@contextmanager
def attention_as_asked(config: ServeConfig) -> Iterator[None]:
    """Where programs are traced: a backend that was asked for and cannot do what it must is the configuration's fault.

    Raises:
        ConfigError: It cannot.
    """
    try:
        yield
    except NotImplementedError as error:
        if config.attention is None:
            raise
        raise ConfigError(
            f"--attention {config.attention} cannot serve this: {error}. Leave it out for the best that can.",
            param="attention",
        ) from error


def _at_the_same_time(
    load: partial[Mapping[str, Held]],
    replica: Replica,
    config: ServeConfig,
    bundle: Bundle | None,
    progress: Progress | None,
) -> tuple[Mapping[str, Held], Executables]:
    holders: Future[Executables] = Future()
    given_up = threading.Event()

    def hold(path: str, loaded: Array) -> Held:
        executables = holders.result()
        if given_up.is_set():
            raise CancelledError
        return replica.hold(path, loaded, executables)

    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        try:
            loading = pool.submit(load, hold)

            def watch(what: str, done: int, total: int) -> None:
                if loading.done():
                    loading.result()  # a failure is not kept back until everything is compiled
                if progress is not None:
                    progress(what, done, total)

            if bundle is not None:
                executables: Executables = bundle.load(replica, config, progress=watch)
                holders.set_result(executables)
            else:
                holders.set_result(compile_holders(replica))
                executables = _compile_others(replica, holders.result(), watch)
        except BaseException as error:
            given_up.set()
            if not holders.done():
                holders.set_exception(error)
            raise
        return loading.result(), executables


def _compile_others(replica: Replica, holders: Executables, progress: Progress | None) -> Executables:
    """All programs of a replica, of which some are there."""
    others = [program for program in programs(replica) if program.key not in holders]
    return {**holders, **compile_programs(others, num_threads=_compiles_at_once(replica), progress=progress)}


def _compiles_at_once(replica: Replica) -> int:
    return compiles_at_once(replica.mesh.devices.flat[0].device_kind)
