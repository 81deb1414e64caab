"""LocalEngine: one thread that schedules, dispatches and commits steps, one step ahead of the device.

While a step runs on the device the next one is scheduled and dispatched; only then is the first one's result awaited.
Its tokens need not be known for that: they stay on the device and are the next step's input. A lock guards the
scheduler, held for bookkeeping only and never while waiting for the device, so that requests are validated and queued
in the caller's thread.

    schedule N+1 -> dispatch N+1 -> wait for N -> commit N -> deliver events of N -> schedule N+2 ...

A step that fails ends its own sequences with an error event; the device state is made anew and every other sequence is
computed again. Requests come, end and are counted meanwhile. If the device state cannot be made anew, or the loop
itself fails, the engine is dead: it ends every sequence with an error event, refuses new ones, and says so in `health`.
A device that does not answer cannot be told from a slow one: the watchdog says when it has been too slow.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

from jaxserve.core.errors import InvalidRequestError, UnavailableError
from jaxserve.core.types import FinishReason, Request, TokenEvent
from jaxserve.engine.api import EngineInfo, EngineStats, Health
from jaxserve.engine.mailbox import EventStream, put_all
from jaxserve.engine.runner import Runner, StepHandle
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.steps import ScheduledStep
from jaxserve.engine.watchdog import Watchdog
from jaxserve.sampling.validate import SamplingLimits, validate_sampling

logger = logging.getLogger(__name__)

IDLE_RETRY_S = 0.01
"""How long the loop waits when there is work but none of it can run yet."""

DRAINING = "The engine is draining; send the request to another replica."
CLOSED = "The engine is closed."


class StepObserver(Protocol):
    """Is told how long each step took."""

    def observe_step(self, program: str, bucket: str, seconds: float) -> None:
        """Records the seconds from a step's dispatch to its tokens, and the shape it ran in."""
        ...

    def observe_step_host(self, seconds: float) -> None:
        """Records the seconds of host work: scheduling, packing, dispatching, committing."""
        ...


@dataclass(slots=True)
class _Flight:
    """A dispatched step whose tokens have not been read."""

    step: ScheduledStep
    handle: StepHandle
    dispatched_s: float
    host_s: float


class LocalEngine:
    """Implements `Engine` on the devices of this process.

    Args:
        scheduler: Decides what runs; owned by the engine from now on.
        runner: Runs it.
        info: Facts to report.
        limits: What the sampler can hold; requests beyond it are refused.
        observer: Is told about each step.
        num_compiles: Counts programs compiled since the engine was ready.
        watchdog: Knows when a step takes too long.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        info: EngineInfo,
        limits: SamplingLimits,
        observer: StepObserver | None = None,
        num_compiles: Callable[[], int] = lambda: 0,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._info = info
        self._limits = limits
        self._observer = observer
        self._num_compiles = num_compiles
        self._watchdog = watchdog or Watchdog()
        self._streams: dict[str, EventStream] = {}
        self._work = threading.Condition()
        self._refusal = ""
        self._alive = True
        self._closing = False
        self._num_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """Facts that never change."""
        return self._info

    def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Submits a request at once and yields its events; see `Engine.stream`."""
        check_request(request, self._info, self._limits)
        stream = EventStream(request.request_id, request.n, self.abort)
        health = self.health()
        if not health.alive:
            raise UnavailableError(health.reason)
        with self._work:
            if self._refusal:
                raise UnavailableError(self._refusal)
            if request.request_id in self._streams:
                raise InvalidRequestError(f"A request with id {request.request_id} is in flight.", param="request_id")
            self._scheduler.submit(request)
            self._streams[request.request_id] = stream
            self._work.notify()
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; unknown ids are ignored."""
        with self._work:
            if request_id in self._streams:
                self._deliver(self._scheduler.abort(request_id))

    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""
        with self._work:
            stats = self._scheduler.stats()
        return replace(
            stats,
            num_steps=self._num_steps,
            num_compiles_after_ready=self._num_compiles(),
            step_age_s=self._watchdog.age_s(),
        )

    def health(self) -> Health:
        """Whether the engine can serve. Takes no lock, so that it answers whatever the engine's thread hangs in."""
        overdue = self._watchdog.overdue()
        if self._alive and overdue is not None:
            return Health(alive=not overdue.lost, ready=False, reason=overdue.reason)
        return Health(alive=self._alive, ready=not self._refusal, reason=self._refusal)

    async def drain(self, deadline_s: float) -> bool:
        """Refuses new requests and waits for those in flight; see `Engine.drain`. A shorter drain may join a longer."""
        with self._work:
            self._refusal = self._refusal or DRAINING
        deadline = time.monotonic() + deadline_s
        while self._streams:
            if time.monotonic() >= deadline:
                for request_id in tuple(self._streams):
                    self.abort(request_id)
                return False
            await asyncio.sleep(0.01)
        return True

    async def close(self) -> None:
        """Aborts what is left, ends the thread and frees the device's memory. Idempotent."""
        with self._work:
            self._refusal = CLOSED
            self._closing = True
            for request_id in tuple(self._streams):
                self._deliver(self._scheduler.abort(request_id))
            self._work.notify()
        # Looked at again and again, for whoever waits may have to give up.
        while self._thread.is_alive():
            await asyncio.sleep(0.01)
        self._runner.close()

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            logger.critical("The engine's loop failed: %s", error, exc_info=error)
            with self._work:
                self._die(f"The engine failed ({error}); restart the process.")
        finally:
            self._watchdog.idle()

    def _loop(self) -> None:
        flight: _Flight | None = None
        while True:
            started = time.perf_counter()
            with self._work:
                if not self._alive:
                    return
                if flight is None:
                    self._watchdog.step()
                step = None if self._closing else self._scheduler.schedule()
                if step is not None:
                    step = replace(step, admitted=tuple(map(_as_admitted, step.admitted)))
                if step is None and flight is None:
                    if self._closing:
                        return
                    self._watchdog.idle()
                    self._work.wait(IDLE_RETRY_S if self._scheduler.has_work else None)
                    continue
            following = None
            if step is not None:
                following, flight = self._dispatch(step, flight, started)
            if flight is not None and not self._land(flight) and following is not None:
                # What was dispatched on top of a failed step has computed nothing of worth.
                following = None
            flight = following

    def _dispatch(
        self, step: ScheduledStep, flight: _Flight | None, started: float
    ) -> tuple[_Flight | None, _Flight | None]:
        """Dispatches a step; if that fails, the one in flight is landed first and the step's sequences end.

        Returns:
            The new flight, and the old one if it is still to be landed.
        """
        try:
            handle = self._runner.execute(step)
        except Exception as error:
            if flight is not None:
                self._land(flight)
            self._recover(step, error)
            return None, None
        self._watchdog.step()
        now = time.perf_counter()
        return _Flight(step, handle, now, now - started), flight

    def _land(self, flight: _Flight) -> bool:
        """Reads a step's tokens and commits them; False if the step had failed."""
        try:
            result = flight.handle.result()
        except Exception as error:
            self._recover(flight.step, error)
            return False
        arrived = time.perf_counter()
        self._watchdog.step()
        with self._work:
            self._num_steps += 1
            self._deliver(self._scheduler.commit(flight.step, result))
        if self._observer is not None:
            self._observer.observe_step("step", flight.handle.bucket, arrived - flight.dispatched_s)
            self._observer.observe_step_host(flight.host_s + time.perf_counter() - arrived)
        return True

    def _recover(self, step: ScheduledStep, error: Exception) -> None:
        """Ends the sequences of a failed step and makes the device state anew for the others."""
        logger.error("A step of %d sequences failed: %s", len(step.items), error, exc_info=error)
        self._watchdog.step()
        with self._work:
            self._deliver(self._scheduler.fail(step, "A step failed on the device; try the request again."))
            # Nothing is left on the device from here on, so whoever comes or goes during the reset finds books that
            # are in order.
            self._scheduler.restart()
        try:
            self._runner.reset()
        except Exception as fatal:
            logger.critical("The device state cannot be made anew: %s", fatal, exc_info=fatal)
            with self._work:
                self._die(f"The device is lost ({fatal}); restart the process.")

    def _die(self, reason: str) -> None:
        """Ends every sequence and refuses new ones; the lock is held. Does not count on the scheduler to be sane."""
        self._alive = False
        self._refusal = reason
        self._deliver(
            [
                TokenEvent(request_id=stream.request_id, index=index, finish_reason=FinishReason.ERROR, error=reason)
                for stream in self._streams.values()
                for index in sorted(stream.live)
            ]
        )
        try:
            self._scheduler.fail_all(reason)
        except Exception as error:
            logger.critical("The scheduler cannot end its sequences: %s", error, exc_info=error)

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Hands events to the event loops that wait for them; the lock is held."""
        # An event of nobody raises here, before anything has changed.
        addressed = [(self._streams[event.request_id], event) for event in events]
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[EventStream, TokenEvent]]] = defaultdict(list)
        for stream, event in addressed:
            by_loop[stream.loop].append((stream, event))
            if event.finish_reason is not None:
                stream.live.discard(event.index)
                if not stream.live:
                    self._streams.pop(event.request_id, None)
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(put_all, deliveries)
            except RuntimeError:
                # Whoever read in that event loop is gone, and the loop may close at any moment.
                if not loop.is_closed():
                    raise


def _as_admitted(sequence: Sequence) -> Sequence:
    """A copy of what the device loads, made under the lock.

    The step is dispatched without the lock, and an abort meanwhile takes slot and pages from the sequence itself: its
    state would be loaded into another's slot, and its keys written to pages that are no longer its own.
    """
    admitted = copy(sequence)
    admitted.token_ids = list(sequence.token_ids)
    admitted.table = copy(sequence.table)
    admitted.table.pages = list(sequence.pages)
    return admitted


def check_request(request: Request, info: EngineInfo, limits: SamplingLimits) -> None:
    """Refuses what no engine of this model can serve.

    Raises:
        InvalidRequestError: A field is out of range; `param` names it.
    """
    if not request.prompt:
        raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
    if min(request.prompt) < 0 or max(request.prompt) >= info.vocab_size:
        raise InvalidRequestError(f"Prompt token ids must be in [0, {info.vocab_size}).", param="prompt")
    if request.n < 1:
        raise InvalidRequestError("n must be at least 1.", param="n")
    validate_sampling(request.sampling, limits)
