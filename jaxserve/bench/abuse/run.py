"""What a server makes of malformed requests, of costly ones, and of connections that say nothing.

A prober in a process of its own asks for `/health` all the time (`probe`). Meanwhile random malformed requests are sent
a few at a time (`cases`), then the costly ones one after another (`bodies`), then connections are opened that stay
silent. In the end an ordinary request must still be answered.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from jaxserve.bench.abuse.bodies import named_bodies
from jaxserve.bench.abuse.cases import COMPLETIONS, Malformed
from jaxserve.bench.abuse.probe import Probes, probing, resident_bytes
from jaxserve.bench.abuse.wire import Address, Attack, Outcome, deliver, json_bytes, loopback_address, request
from jaxserve.bench.openai_url import auth_headers
from jaxserve.core.errors import UnavailableError

T = TypeVar("T")

SETTLE_S = 1.0
"""How long the server is left alone before its memory is read again."""

_NORMAL_TIMEOUT_S = 60.0
_RESIDENT = re.compile(rb"^process_resident_memory_bytes ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to do to which server.

    Attributes:
        url: The server, on this machine.
        num_requests: Malformed requests to send.
        concurrency: How many of them are on their way at once.
        seed: Another seed, other requests.
        bodies: Whether to send the costly ones, too.
        num_silent: Connections to open that stay silent.
        api_key: Key to present.
        pid: The server's process, whose memory is read at every probe; None asks `/metrics` before and after.
        patience_s: How long a malformed request waits for an answer; many have none, for the server waits for the rest.
        timeout_s: Longest that a costly request may take.
        max_seconds: Longest that all may take; what has not been sent by then is left out.
    """

    url: str
    num_requests: int = 25_000
    concurrency: int = 8
    seed: int = 0
    bodies: bool = True
    num_silent: int = 0
    api_key: str | None = None
    pid: int | None = None
    patience_s: float = 1.0
    timeout_s: float = 60.0
    max_seconds: float = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedResult:
    """One costly request.

    Attributes:
        name: What it is.
        status: What came of it.
        seconds: How long it took.
        stall_s: Longest that `/health` took meanwhile.
    """

    name: str
    status: str
    seconds: float
    stall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SilentResult:
    """A new request beside silent connections.

    Attributes:
        asked: How many were to be opened.
        opened: How many were.
        seconds: Until the new request was answered, or given up.
        status: Of its answer.
    """

    asked: int
    opened: int
    seconds: float
    status: str


@dataclass(frozen=True, kw_only=True)
class AbuseReport:
    """What came of it; times are in seconds, memory in bytes, None where nothing is known.

    Attributes:
        num_sent: Malformed requests that were sent.
        seconds: How long these took.
        statuses: How many ended in which way.
        server_errors: How many answers of 5xx each kind of malformed request had.
        probes: What the prober saw: number, failures, median, 99.9th percentile and worst, and how late it was itself.
        worst_at: What was going on at the worst probe.
        memory: Resident memory of the server before, at its peak (only with a pid), and after.
        named: The costly requests.
        silent: A new request beside silent connections; None if there were none.
        normal: Status and seconds of an ordinary request at the end.
    """

    num_sent: int
    seconds: float
    statuses: dict[str, int]
    server_errors: dict[str, int]
    probes: dict[str, float]
    worst_at: str
    memory: dict[str, int | None]
    named: list[NamedResult] = field(default_factory=list)
    silent: SilentResult | None = None
    normal: tuple[str, float]

    @property
    def survived(self) -> bool:
        """Whether the server answers an ordinary request at the end, and has never answered with a 5xx."""
        return self.normal[0] == "200" and not self.server_errors

    def as_json(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {**asdict(self), "survived": self.survived}


def run_abuse(plan: Plan, *, before_sending: Callable[[], object] = lambda: None) -> AbuseReport:
    """Does it all.

    Args:
        plan: What to do.
        before_sending: Called once the prober runs, as to make this process give way to others.

    Raises:
        ConfigError: The server is not on this machine.
        UnavailableError: It does not answer before anything has been done to it.
    """
    address, headers = loopback_address(plan.url), auth_headers(plan.api_key)
    target = _Target(address=address, headers=headers, model=_model(address, headers))
    deadline = time.monotonic() + plan.max_seconds
    _ordinary(target)
    before = _resident(address, plan.pid)
    with probing(address, plan.pid) as prober:
        before_sending()
        attacks = itertools.islice(Malformed(target.model, plan.seed, headers), plan.num_requests)
        malformed, ends = _timed("malformed requests", lambda: list(_all_delivered(address, attacks, plan, deadline)))
        costly = list(_costly(target, plan, deadline)) if plan.bodies else []
        beside, silent = _timed("silent connections", lambda: _silent(target, plan.num_silent))
        time.sleep(SETTLE_S)
        normal = _ordinary(target)
        probes = prober.stop()
    failed = Counter(kind for kind, status in ends if status.startswith("5"))
    failed.update(span.name for span, status in costly if status.startswith("5"))
    return AbuseReport(
        num_sent=len(ends),
        seconds=malformed.end - malformed.start,
        statuses=dict(Counter(status for _, status in ends).most_common()),
        server_errors=dict(failed),
        probes=_summary(probes),
        worst_at=_worst_at(probes, [malformed, *(span for span, _ in costly), beside]),
        memory={"before": before, "peak": probes.peak_bytes, "after": _resident(address, plan.pid)},
        named=[
            NamedResult(
                name=span.name,
                status=status,
                seconds=span.end - span.start,
                stall_s=max(probes.seconds(span.start, span.end), default=0.0),
            )
            for span, status in costly
        ],
        silent=silent,
        normal=(normal.status, normal.seconds),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """The server."""

    address: Address
    headers: dict[str, str]
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """What was going on, from when to when on the machine's monotonic clock."""

    name: str
    start: float
    end: float


def _timed(name: str, work: Callable[[], T]) -> tuple[_Span, T]:
    started = time.monotonic()
    value = work()
    return _Span(name=name, start=started, end=time.monotonic()), value


def _costly(target: _Target, plan: Plan, deadline: float) -> Iterator[tuple[_Span, str]]:
    """Each of the costly requests, and how it ended."""
    for named in named_bodies(target.address, target.model, target.headers, timeout_s=plan.timeout_s):
        if time.monotonic() > deadline:
            return
        yield _timed(named.name, named.run)


def _all_delivered(
    address: Address, attacks: Iterator[Attack], plan: Plan, deadline: float
) -> Iterator[tuple[str, str]]:
    """Sends attacks a few at a time; the kind of each, and how it ended."""

    def send(attack: Attack) -> tuple[str, str]:
        return attack.kind, deliver(address, attack, timeout_s=plan.patience_s).status

    with ThreadPoolExecutor(plan.concurrency, thread_name_prefix="abuse") as pool:
        while time.monotonic() < deadline and (some := list(itertools.islice(attacks, 16 * plan.concurrency))):
            yield from pool.map(send, some)


def _silent(target: _Target, count: int) -> SilentResult | None:
    """Opens connections that say nothing, then asks something on a new one."""
    if not count:
        return None
    with ExitStack() as stack:
        opened = 0
        for _ in range(count):
            try:
                stack.enter_context(socket.create_connection(target.address, timeout=_NORMAL_TIMEOUT_S))
            except OSError:
                break
            opened += 1
        outcome = _ordinary(target)
    return SilentResult(asked=count, opened=opened, seconds=outcome.seconds, status=outcome.status)


def _ordinary(target: _Target) -> Outcome:
    """A request as users send them."""
    body = json_bytes({"model": target.model, "prompt": "Hello", "max_tokens": 1})
    attack = Attack(kind="ordinary", data=request(COMPLETIONS, body, headers=target.headers))
    return deliver(target.address, attack, timeout_s=_NORMAL_TIMEOUT_S)


def _model(address: Address, headers: dict[str, str]) -> str:
    attack = Attack(kind="models", data=request("/v1/models", method="GET", headers=headers))
    outcome = deliver(address, attack, timeout_s=_NORMAL_TIMEOUT_S)
    if outcome.status != "200":
        raise UnavailableError(
            f"The server at {address[0]} port {address[1]} does not list its models: {outcome.status}."
        )
    return str(json.loads(outcome.body)["data"][0]["id"])


def _resident(address: Address, pid: int | None) -> int | None:
    if pid is not None:
        return resident_bytes(pid)
    outcome = deliver(
        address, Attack(kind="metrics", data=request("/metrics", method="GET")), timeout_s=_NORMAL_TIMEOUT_S
    )
    found = _RESIDENT.search(outcome.body)
    return int(float(found[1])) if found else None


def _summary(probes: Probes) -> dict[str, float]:
    took = probes.seconds()
    return {
        "number": len(took),
        "failed": probes.num_failed,
        "median_s": took[len(took) // 2],
        "p999_s": took[min(len(took) - 1, len(took) * 999 // 1000)],
        "worst_s": took[-1],
        "late_s": probes.late_s,
    }


def _worst_at(probes: Probes, spans: list[_Span]) -> str:
    began, took, _ = max(probes.samples, key=lambda sample: sample[1])
    during = [span.name for span in spans if span.start < began + took and began < span.end]
    return ", ".join(during) or "nothing"
