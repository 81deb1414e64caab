"""A process of its own that asks for `/health` all the time, so that what holds up the server shows as a late answer.

It also reads the server's resident memory, if it is told its process, and how late it wakes up itself: on a machine
without an idle core some of what it sees is its own lateness.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from jaxserve.bench.abuse.wire import Address, Attack, deliver, request

INTERVAL_S = 0.005
"""Between the end of a probe and the next."""

TIMEOUT_S = 120.0
"""When a probe gives up; what is this late is reported as this late."""

_STOP_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """What the prober saw.

    Attributes:
        samples: When each probe began (on the machine's monotonic clock), the seconds its answer took, and whether it
            was a 200.
        late_s: The longest that the prober itself woke up late.
        peak_bytes: Most resident memory of the server's process at any time; None if that is unknown.
    """

    samples: tuple[tuple[float, float, bool], ...]
    late_s: float
    peak_bytes: int | None

    def seconds(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds of the answers to the probes that ran at some time in [start, end], ascending."""
        return sorted(took for began, took, _ in self.samples if began <= end and began + took >= start)

    @property
    def num_failed(self) -> int:
        """Probes without a 200."""
        return sum(not well for _, _, well in self.samples)


class Prober:
    """Runs the process.

    Args:
        address: Where the server listens.
        pid: The server's process; None leaves its memory out.
    """

    def __init__(self, address: Address, pid: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=probe, args=(theirs, address, pid), name="prober", daemon=True)
        self._process.start()
        theirs.close()
        # Its first word says that it runs.
        self._pipe.recv()

    def stop(self) -> Probes:
        """Ends the process; what it saw."""
        self._pipe.send(None)
        found: Probes = self._pipe.recv()
        self._process.join(_STOP_S)
        return found

    def kill(self) -> None:
        """Ends the process if it still runs, whatever it does."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextmanager
def probing(address: Address, pid: int | None) -> Iterator[Prober]:
    """A prober that ends with the block."""
    prober = Prober(address, pid)
    try:
        yield prober
    finally:
        prober.kill()


def probe(pipe: Connection, address: Address, pid: int | None) -> None:
    """Asks until the other end of the pipe says something, then sends `Probes`."""
    health = Attack(kind="probe", data=request("/health", method="GET"))
    samples: list[tuple[float, float, bool]] = []
    late_s, peak_bytes = 0.0, 0
    pipe.send(None)
    while True:
        began = time.monotonic()
        outcome = deliver(address, health, timeout_s=TIMEOUT_S)
        samples.append((began, outcome.seconds, outcome.status == "200"))
        if pid is not None:
            peak_bytes = max(peak_bytes, resident_bytes(pid) or 0)
        waits = time.monotonic()
        if pipe.poll(INTERVAL_S):
            break
        late_s = max(late_s, time.monotonic() - waits - INTERVAL_S)
    pipe.send(Probes(samples=tuple(samples), late_s=late_s, peak_bytes=peak_bytes or None))


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process; None if it is gone or the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else None
