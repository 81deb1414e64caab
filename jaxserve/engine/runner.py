"""The only owner of device state: parameters, KV pool, sampler state.

`execute` loads newly admitted slots, copies pages, and dispatches a step; it returns at once with a handle whose
`result()` waits for the tokens. The pool and the sampler's state are donated to each program and replaced by what it
returns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array

from jaxserve.engine.batch import BatchBuilder
from jaxserve.engine.compile import Executables
from jaxserve.engine.logprobs import LogprobTable
from jaxserve.engine.programs import COPY_BATCH, Replica
from jaxserve.engine.steps import ScheduledStep, StepResult
from jaxserve.models.params import Held
from jaxserve.sampling.logprobs import SampleOutput
from jaxserve.sampling.state import admission


class StepHandle(Protocol):
    """A step that has been dispatched."""

    @property
    def bucket(self) -> str:
        """The shape it ran in, as metrics call it."""
        ...

    def result(self) -> StepResult:
        """Waits for the device and brings the step's tokens to the host."""
        ...


class Runner(Protocol):
    """What the loop needs of a device."""

    def execute(self, step: ScheduledStep) -> StepHandle:
        """Dispatches a step and returns without waiting for it."""
        ...

    def reset(self) -> None:
        """Makes the KV pool and the sampler's state anew after a failed step; raises if the device is lost."""
        ...

    def close(self) -> None:
        """Gives all device memory back; idempotent. Nothing runs afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step on its way; the arrays are being computed."""

    bucket: str
    last: Array
    sampled: SampleOutput | None
    reports: bool
    prompt: SampleOutput | None

    def result(self) -> StepResult:
        """See `StepHandle.result`."""
        if self.sampled is None:
            # Nobody's token comes of it, but the loop must not run ahead: what it has dispatched cannot be taken back.
            self.last.block_until_ready()
            return StepResult(token_ids=[], prompt=None if self.prompt is None else _host(self.prompt))
        return StepResult(
            token_ids=np.asarray(self.sampled.token_ids).tolist(),
            logprobs=_host(self.sampled) if self.reports else None,
            prompt=None if self.prompt is None else _host(self.prompt),
        )


def _host(output: SampleOutput) -> LogprobTable:
    return LogprobTable.of({name: np.asarray(value) for name, value in vars(output).items()})


class DeviceRunner:
    """Runs steps on the devices of a mesh.

    Args:
        replica: What fixes the programs.
        params: Parameters by path, as programs take them.
        executables: Compiled programs.
    """

    def __init__(self, replica: Replica, params: Mapping[str, Held], executables: Executables) -> None:
        self._replica = replica
        self._params = params
        self._executables = executables
        self._builder = self._new_builder()
        self._kv_pages = executables["allocate", 0]()
        self._sampling = replica.init_sampling()

    def execute(self, step: ScheduledStep) -> DeviceStep:
        """Dispatches a step and returns without waiting for it."""
        run, limits = self._executables, self._replica.limits
        for sequence in step.admitted:
            self._builder.admit(sequence)
            params = sequence.request.sampling
            row = admission(params, sequence.token_ids, sequence.num_prompt, sequence.seed, limits)
            self._sampling = run["admit", 0](self._sampling, np.int32(sequence.slot), row)
        if step.page_copies:
            self._copy(step.page_copies)
        size, inputs = self._builder.build(step)
        history = self._sampling.history
        self._kv_pages, decoded = run["decode", size](self._params, self._kv_pages, history, inputs)
        prompt = None
        if any(item.scores_prompt for item in step.items):
            prompt = run["score", size](self._params, decoded.hidden, decoded.following)
        sampling = [item.sequence.request.sampling for item in step.items if item.samples]
        if not sampling:
            return DeviceStep(str(size), decoded.last, None, False, prompt)
        rows = self._replica.buckets.seqs_for(len(step.items))
        self._sampling, sampled = run["head", rows](self._params, self._sampling, decoded.last, inputs.packed)
        sampled.token_ids.copy_to_host_async()
        return DeviceStep(str(size), decoded.last, sampled, any(s.logprobs is not None for s in sampling), prompt)

    def reset(self) -> None:
        """Makes the KV pool and the sampler's state anew; what a failed step left behind is unusable."""
        self._delete_state()
        self._builder = self._new_builder()
        self._kv_pages = self._executables["allocate", 0]()
        self._sampling = self._replica.init_sampling()
        jax.block_until_ready(self._kv_pages)

    def close(self) -> None:
        """Gives all device memory back; idempotent. Nothing runs afterwards."""
        self._params = {}
        self._delete_state()

    def _delete_state(self) -> None:
        """Gives up what a step changes; there is no room for a second pool."""
        for array in jax.tree.leaves((self._kv_pages, self._sampling)):
            array.delete()

    def warm_up(self) -> float:
        """Waits until the device state exists; returns the seconds it took."""
        started = time.monotonic()
        jax.block_until_ready((self._params, self._kv_pages, self._sampling))
        return time.monotonic() - started

    def _new_builder(self) -> BatchBuilder:
        replica = self._replica
        return BatchBuilder(replica.buckets, pages_per_seq=replica.pages_per_seq)

    def _copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        for first in range(0, len(copies), COPY_BATCH):
            some = copies[first : first + COPY_BATCH]
            pairs = np.full((2, COPY_BATCH), -1, np.int32)
            pairs[:, : len(some)] = np.array(some, np.int32).T
            self._kv_pages = self._executables["copy_pages", 0](self._kv_pages, pairs[0], pairs[1])
