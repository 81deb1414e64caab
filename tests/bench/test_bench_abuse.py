"""`jaxserve bench abuse`: what it sends, what it sees, and that it sees a server that stalls or fails."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from itertools import islice

import pytest
from server_harness import live_server, make_app, make_engine

from jaxserve.bench.abuse import run as abuse
from jaxserve.bench.abuse.bodies import Named, named_bodies
from jaxserve.bench.abuse.cases import Malformed
from jaxserve.bench.abuse.run import AbuseReport, Plan, run_abuse
from jaxserve.bench.abuse.wire import Address, Attack, Ending, deliver, loopback_address, request
from jaxserve.cli import main
from jaxserve.core.errors import ConfigError, UnavailableError

KINDS = {
    *("broken JSON", "wrong type", "deep nesting", "huge number", "unknown field", "odd text", "bad header"),
    *("bad chunks", "odd encoding", "oversize", "bad method", "bad path", "half a body", "early leave", "garbage"),
    *("repeated", "out of range"),
}


def test_one_seed_one_sequence_of_all_kinds() -> None:
    first, again, other = (list(islice(Malformed("m", seed, {"X-Key": "k"}), 400)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {attack.kind for attack in first} == KINDS
    assert sum(len(attack.data) for attack in first) < 20_000_000
    kept = [attack for attack in first if attack.kind not in ("garbage", "oversize")]
    assert all(b"X-Key: k\r\n" in attack.data for attack in kept)


def test_costly_requests_fit_the_limits_they_are_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}
    sent: list[int] = []

    def note(address: Address, attack: Attack, *, timeout_s: float) -> object:
        sent.append(len(attack.data))
        return type("Outcome", (), {"status": "noted"})()

    monkeypatch.setattr("jaxserve.bench.abuse.bodies.deliver", note)
    for named in named_bodies(("127.0.0.1", 1), "m", {}, timeout_s=1):
        if named.run.__name__ == "run":
            assert named.run() == "noted"
            assert named.name not in sizes
            sizes[named.name] = sent[-1]
    assert len(sizes) > 35
    assert all(size <= 8 << 20 for size in sizes.values())
    assert sizes["170 messages of 16,000 empty parts"] > 8_000_000
    assert sum(size > 8_000_000 for size in sizes.values()) > 25


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1:80", "https://127.0.0.1", "ftp://127.0.0.1", "http://0.0.0.0", "http://"]
)
def test_only_servers_on_this_machine(url: str) -> None:
    with pytest.raises(ConfigError):
        run_abuse(Plan(url=url))


def test_addresses() -> None:
    assert loopback_address("http://127.0.0.1:8000/v1") == ("127.0.0.1", 8000)
    assert loopback_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert loopback_address("http://[::1]:81") == ("::1", 81)


class Scripted:
    """A server that reads once from each connection, sends the next of its texts, and closes; None keeps still."""

    def __init__(self, *answers: bytes | None) -> None:
        self._answers = iter(answers)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._socket.getsockname()
        self._kept: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for answer in self._answers:
            connection, _ = self._socket.accept()
            connection.recv(1000)
            if answer is None:
                self._kept.append(connection)
                continue
            connection.sendall(answer)
            connection.close()

    def close(self) -> None:
        self._thread.join(10)
        for connection in (*self._kept, self._socket):
            connection.close()


def test_how_requests_end() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhello"
    server = Scripted(answer, b"HTTP/1.1 500 No\r\n\r\nwhy", b"", None, answer)
    plain = Attack(kind="plain", data=request("/", method="GET"))
    outcomes = [deliver(server.address, plain, timeout_s=0.2) for _ in range(4)]
    assert [outcome.status for outcome in outcomes] == ["200", "500", "closed", "silent"]
    assert [outcome.body for outcome in outcomes[:2]] == [b"hello", b"why"]
    left = deliver(server.address, Attack(kind="gone", data=b"x", ending=Ending.LEAVE), timeout_s=0.2)
    assert left.status == "left"
    server.close()
    assert deliver(server.address, plain, timeout_s=0.2).status == "refused"


async def run_on_fake(plan_fields: dict[str, object], *, killed: bool = False) -> AbuseReport:
    engine = make_engine()
    async with live_server(make_app(engine), engine) as server:
        if killed:
            engine.kill("The device is gone.")
        defaults = {"url": server.url, "bodies": False, "patience_s": 0.2, "timeout_s": 10}
        return await asyncio.to_thread(run_abuse, Plan(**{**defaults, **plan_fields}))  # type: ignore[arg-type]  # fields of many types


async def test_a_server_that_takes_it() -> None:
    report = await run_on_fake({"num_requests": 150, "num_silent": 5, "pid": os.getpid()})
    assert report.num_sent == sum(report.statuses.values()) == 150
    assert report.statuses["400"] > 50
    assert report.server_errors == {}
    assert report.normal[0] == "200"
    assert report.survived
    assert report.silent is not None
    assert (report.silent.opened, report.silent.status) == (5, "200")
    assert report.probes["number"] > 10
    assert report.probes["failed"] == 0
    assert 0 < report.probes["median_s"] <= report.probes["p999_s"] <= report.probes["worst_s"]
    memory = report.memory
    assert all(number is not None and number > 10 << 20 for number in memory.values())
    json.dumps(report.as_json())


async def test_a_server_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prober sees it, says how long and what was going on; what is fine is not blamed."""
    loop = asyncio.get_running_loop()

    def costly(*args: object, **kwargs: object) -> Iterator[Named]:
        def stall() -> str:
            loop.call_soon_threadsafe(time.sleep, 1.0)
            time.sleep(1.0)
            return "200"

        def rest() -> str:
            time.sleep(0.3)
            return "400"

        yield Named(name="stalls", run=stall)
        yield Named(name="pause", run=rest)
        yield Named(name="does not", run=rest)

    monkeypatch.setattr(abuse, "named_bodies", costly)
    report = await run_on_fake({"num_requests": 1, "bodies": True})
    stalls, _, quiet = report.named
    assert stalls.stall_s > 0.5
    assert report.probes["worst_s"] == stalls.stall_s
    assert "stalls" in report.worst_at
    assert quiet.stall_s < stalls.stall_s
    assert [each.status for each in report.named] == ["200", "400", "400"]


async def test_a_server_that_fails() -> None:
    with pytest.raises(UnavailableError, match="refused"):
        await run_on_fake({"url": "http://127.0.0.1:1"})
    report = await run_on_fake({"num_requests": 100}, killed=True)
    assert report.normal[0] == "503"
    assert report.server_errors
    assert report.probes["failed"] == report.probes["number"]
    assert not report.survived


async def test_it_ends_when_its_time_is_over() -> None:
    report = await run_on_fake({"num_requests": 10**9, "max_seconds": 0.3})
    assert 0 < report.num_sent < 10**6


@pytest.mark.parametrize("status", ["200", "silent"])
def test_the_command(status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plans: list[Plan] = []

    def fake(plan: Plan, **_: object) -> AbuseReport:
        plans.append(plan)
        return AbuseReport(
            num_sent=3,
            seconds=1.5,
            statuses={"400": 3},
            server_errors={},
            probes={"number": 9, "failed": 0, "median_s": 0.001, "p999_s": 0.01, "worst_s": 0.25, "late_s": 0.002},
            worst_at="malformed requests",
            memory={"before": 1 << 20, "peak": None, "after": 2 << 20},
            named=[abuse.NamedResult(name="a body", status="413", seconds=0.5, stall_s=0.1)],
            silent=abuse.SilentResult(asked=2, opened=2, seconds=0.01, status="200"),
            normal=(status, 0.1),
        )

    monkeypatch.setattr(abuse, "run_abuse", fake)
    wanted = 0 if status == "200" else 1
    assert main(["bench", "abuse", "--requests", "3", "--silent", "2", "--no-bodies", "--json"]) == wanted
    assert json.loads(capsys.readouterr().out)["survived"] is (status == "200")
    assert (plans[0].num_requests, plans[0].num_silent, plans[0].bodies) == (3, 2, False)
    assert main(["bench", "abuse"]) == wanted
    shown = capsys.readouterr().out
    for part in ("250 ms (malformed requests)", "unknown", "2 MiB", "a body", "413", "silent connections"):
        assert part in shown
    assert (plans[1].num_requests, plans[1].bodies) == (25_000, True)
