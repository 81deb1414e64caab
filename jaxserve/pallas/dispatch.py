"""Which implementation of an op runs: the one that was chosen, or the best one that can.

An op is a folder with one implementation a backend, all of one signature. A backend that lacks something raises
`NotImplementedError` while it is traced, before anything has run. If the caller chose the backend, that error is the
caller's; if not, the platform's next backend takes over and one line is logged. No backend ever ignores an argument.
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import jax

from jaxserve.core.errors import ConfigError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Backend(enum.StrEnum):
    """How an op is implemented.

    REFERENCE is the plainest possible oracle; XLA is efficient pure JAX; TPU and GPU are Pallas kernels (Mosaic and
    Mosaic GPU).
    """

    REFERENCE = "reference"
    XLA = "xla"
    TPU = "tpu"
    GPU = "gpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where an op will run, and how.

    Attributes:
        platform: "cpu", "tpu" or "gpu"; JAX's default backend if None.
        backend: The implementation that was asked for; None takes the platform's best one that can.
    """

    platform: str | None = None
    backend: Backend | None = None

    @property
    def resolved_platform(self) -> str:
        """The platform, JAX's default one if none was named."""
        return self.platform or jax.default_backend()


ANYWHERE = Target()
"""JAX's default backend, and its best implementation."""


def preference(platform: str) -> tuple[Backend, ...]:
    """Backends that can run on a platform, fastest first.

    Args:
        platform: JAX's name of it: "cpu", "tpu", "gpu" or another.
    """
    kernels = {"tpu": (Backend.TPU,), "gpu": (Backend.GPU,)}.get(platform, ())
    return (*kernels, Backend.XLA, Backend.REFERENCE)


def select(op: str, backends: Mapping[Backend, Callable[P, R]], target: Target = ANYWHERE) -> Callable[P, R]:
    """The function to call for an op.

    Args:
        op: Name of the op, for messages.
        backends: Implementations there are, all of one signature.
        target: Where it will run, and the backend asked for; without one, the platform's best one runs that does
            not raise NotImplementedError.

    Raises:
        ConfigError: The op has no such backend, or it is one for GPUs, and this is none; a TPU's can be interpreted.
    """
    chosen = target.backend
    if chosen is not None:
        if chosen not in backends:
            names = ", ".join(backends)
            raise ConfigError(f"{op} has no backend {chosen}; it has {names}.", param="backend")
        if chosen is Backend.GPU and target.resolved_platform != "gpu":
            raise ConfigError(
                f"{op}'s backend gpu runs on GPUs only, not on {target.resolved_platform}.", param="backend"
            )
        return backends[chosen]
    candidates = [b for b in preference(target.resolved_platform) if b in backends]
    if not candidates:
        raise ConfigError(f"{op} has no backend for {target.resolved_platform}.", param="backend")

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for backend, following in itertools.pairwise(candidates):
            try:
                return backends[backend](*args, **kwargs)
            except NotImplementedError as error:
                logger.warning("%s: backend %s cannot do this (%s); using %s", op, backend, error, following)
        return backends[candidates[-1]](*args, **kwargs)

    return call


def deferred(module: str, function: str) -> Callable[..., Any]:
    """A backend that is imported when it is first called: kernels bring their compilers, which no other start pays for.

    Args:
        module: Where it is, within `jaxserve.pallas`.
        function: Its name there.
    """

    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - stands for a function of any signature
        return vars(import_module(f"jaxserve.pallas.{module}"))[function](*args, **kwargs)

    return call


@contextmanager
def interpreted(target: Target) -> Iterator[None]:
    """Traces a TPU kernel that was asked for where there is no TPU for its interpreter: slow, the same arithmetic."""
    if target.backend is not Backend.TPU or target.resolved_platform == "tpu":
        yield
        return
    # Imported here, for it takes a tenth of a second that no other start should pay.
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        yield
