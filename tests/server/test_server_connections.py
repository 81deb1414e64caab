"""Which connection goes when there are too many, and how many there may be; by counting, without sockets."""

from __future__ import annotations

import logging
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError
from jaxserve.server.connections import SILENT_UPLOAD_S, Connections
from jaxserve.server.limits import MAX_CONNECTIONS, ConnectionLimits, connection_limits, raise_open_files


class Peer:
    def __init__(self, name: str, gone: list[str]) -> None:
        self.name = name
        self.gone = gone

    def abort(self) -> None:
        self.gone.append(self.name)

    def check(self, now_s: float) -> None:
        self.gone.append(f"{self.name} checked at {now_s:g}")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gone() -> list[str]:
    """Names of the connections that were closed, in order."""
    return []


@pytest.fixture
def connections(clock: Clock) -> Connections:
    return Connections(ConnectionLimits(max_connections=3, num_reserved=2), clock=clock)


def test_longest_idle_goes_first(connections: Connections, gone: list[str]) -> None:
    a, b, c = (Peer(name, gone) for name in "abc")
    for peer in (a, b, c):
        connections.waits(peer)
    connections.works(a)
    connections.waits(a)
    assert [connections.make_room() for _ in range(4)] == [True, True, True, False]
    assert gone == ["b", "c", "a"]
    assert connections.num_open == 0


def test_what_works_is_never_closed(connections: Connections, clock: Clock, gone: list[str]) -> None:
    for name in "abc":
        connections.works(Peer(name, gone))
    clock.now_s += 1e6
    assert not connections.make_room()
    assert gone == []


def test_uploads_go_after_a_silence(connections: Connections, clock: Clock, gone: list[str]) -> None:
    a, b, c = (Peer(name, gone) for name in "abc")
    for peer in (a, b):
        connections.uploads(peer)
    clock.now_s += SILENT_UPLOAD_S
    connections.uploads(a)
    connections.waits(c)
    assert [connections.make_room() for _ in range(3)] == [True, True, False]
    assert gone == ["c", "b"], "one that waits goes before any upload, and a is not silent"


def test_reserved_places_are_for_probes(connections: Connections, clock: Clock, gone: list[str]) -> None:
    peers = [Peer(name, gone) for name in "abcde"]
    for peer in peers[:3]:
        connections.works(peer)
        assert connections.admits()
    for peer in peers[3:]:
        assert connections.has_room()
        connections.waits(peer)
    connections.works(peers[3])
    assert not connections.admits(), "a fourth may only ask for a probe"
    connections.uploads(peers[0])
    clock.now_s += SILENT_UPLOAD_S
    assert connections.admits()
    assert gone == ["a"]


def test_newcomers_take_the_place_of_those_that_wait(connections: Connections, gone: list[str]) -> None:
    for i in range(20):
        assert connections.has_room()
        connections.waits(Peer(str(i), gone))
    assert gone == [str(i) for i in range(15)]
    assert connections.num_open == 5
    connections = Connections(ConnectionLimits(max_connections=3, num_reserved=2))
    for i in range(5):
        connections.works(Peer(f"w{i}", gone))
    assert not connections.has_room()


def test_what_ends_counts_no_more(connections: Connections, gone: list[str]) -> None:
    peer = Peer("a", gone)
    connections.waits(peer)
    connections.closed(peer)
    connections.closed(peer)
    assert (connections.num_open, connections.make_room()) == (0, False)


def test_sweep_looks_at_each(connections: Connections, gone: list[str]) -> None:
    connections.waits(Peer("a", gone))
    connections.works(Peer("b", gone))
    connections.sweep()
    assert sorted(gone) == ["a checked at 100", "b checked at 100"]


def test_log_says_so_once_in_a_while(
    connections: Connections, clock: Clock, gone: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        for i in range(100):
            connections.waits(Peer(str(i), gone))
            connections.make_room()
            for j in range(5):
                connections.works(Peer(f"{i} {j}", gone))
            assert not connections.has_room()
        clock.now_s += 11
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "(max_connections) are taken: 100 idle or silent ones closed, 100 requests refused" in caplog.messages[1]


@given(
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["waits", "uploads", "works", "closed", "room", "later"])))
)
def test_books_stay_right(steps: list[tuple[int, str]]) -> None:
    """Whatever happens, a connection is in one place, and only those that do not work are closed."""
    clock, gone = Clock(), list[str]()
    connections = Connections(ConnectionLimits(max_connections=3), clock=clock)
    peers = [Peer(str(i), gone) for i in range(8)]
    place: dict[str, str] = {}
    for i, what in steps:
        if what == "later":
            clock.now_s += SILENT_UPLOAD_S
        elif what == "room":
            before = len(gone)
            if connections.make_room():
                [closed] = gone[before:]
                assert place.pop(closed) != "works"
                assert "waits" in place.values() or closed in gone
            else:
                assert "waits" not in place.values()
        else:
            getattr(connections, what)(peers[i])
            place.pop(str(i), None) if what == "closed" else place.update({str(i): what})
        assert connections.num_open == len(place)


class TestLimits:
    @pytest.mark.parametrize("open_files", [32, 64, 100, 128, 256, 1024, 65536, 1 << 20])
    def test_auto_leaves_room_for_files(self, open_files: int) -> None:
        limits = connection_limits(None, open_files=open_files)
        assert 8 <= limits.max_connections <= MAX_CONNECTIONS
        assert limits.num_reserved >= 2
        if open_files >= 128:
            assert limits.max_connections + limits.num_reserved <= open_files - 64
            assert limits.max_connections >= min(open_files // 3, MAX_CONNECTIONS)

    def test_asked_for(self) -> None:
        assert connection_limits(100, open_files=1024).max_connections == 100
        with pytest.raises(ConfigError, match=r"max_connections=2000 needs 2288 open files .* may have 1024.*ulimit"):
            connection_limits(2000, open_files=1024)

    def test_soft_limit_is_raised(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        low = 512 if hard == resource.RLIM_INFINITY else min(512, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        try:
            raised = raise_open_files()
            assert raised == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            assert raised == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
