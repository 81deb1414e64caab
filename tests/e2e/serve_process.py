"""`jaxserve serve` as an operator runs it: a process of its own, reached through HTTP only."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class ServeProcess:
    """A running server.

    Attributes:
        process: The process; what it says goes to `log`.
        url: Where it listens.
        log: Its standard error.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_for(self, path: str, status: int, *, timeout_s: float) -> None:
        """Polls until a path answers with a status; fails with the log if the process ends before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}{path}", timeout=5).status_code == status:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{path} never answered {status}\n{self.log.read_text()}")

    def metrics(self) -> dict[str, float]:
        """Samples of `/metrics` by name with labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over its labels."""
        found = [value for sample, value in self.metrics().items() if sample.partition("{")[0] == name]
        assert found, f"{name} is not on /metrics"
        return sum(found)

    def wait_until_idle(self, *, timeout_s: float = 10) -> None:
        """Polls until nothing waits, runs, or owns a page."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + timeout_s
        while sum(map(self.metric, names)) != 0:
            assert time.monotonic() < deadline, self.metrics()
            time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def serving(log: Path, *flags: str) -> Iterator[ServeProcess]:
    """Starts `jaxserve serve` on a free port; it is killed at the end if it still runs."""
    port = free_port()
    command = [sys.executable, "-m", "jaxserve.cli", "serve", "--port", str(port), *flags]
    # One device, as a user has; the tests' own process has eight.
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=stderr, stderr=stderr, env={**environ, "PYTHONPATH": os.pathsep.join(paths)}
        )
    try:
        yield ServeProcess(process=process, url=f"http://127.0.0.1:{port}", log=log)
    finally:
        process.kill()
        process.wait()
