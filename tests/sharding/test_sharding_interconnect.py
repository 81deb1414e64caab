"""Exchanges on grids and switches: bounds worked out by hand."""

from __future__ import annotations

import pytest

from jaxserve.sharding.interconnect import Exchange, ExchangeKind, wiring
from jaxserve.sharding.topology import parse_topology

MB = 10**6
BIG = 64 * MB
GATHER, REDUCE = ExchangeKind.ALL_GATHER, ExchangeKind.ALL_REDUCE


def seconds(topology: str, num_devices: int, kind: ExchangeKind, num_bytes: int = BIG, count: int = 1) -> float:
    wired = wiring(parse_topology(topology), num_devices)
    return wired.seconds(Exchange(kind=kind, num_bytes=num_bytes, count=count))


@pytest.mark.parametrize(
    ("topology", "rings"),
    [
        ("v5e:4x4", (False, False)),
        ("v6e:8x16", (False, True)),
        ("v6e:16x16", (True, True)),
        ("v5p:2x2x4", (False, False, False)),
        ("v5p:4x4x8", (True, True, True)),
        ("tpu7x:4x4x6", (False, False, False)),
        ("h100:8", (False,)),
    ],
)
def test_axes_that_are_closed(topology: str, rings: tuple[bool, ...]) -> None:
    assert parse_topology(topology).rings == rings


@pytest.mark.parametrize(
    ("topology", "num_devices", "grid", "rings"),
    [
        ("v6e:2x4", 8, (2, 4), (False, False)),
        ("v6e:2x4", 4, (2, 2), (False, False)),
        ("v6e:16x16", 8, (2, 4), (False, False)),
        ("v6e:16x16", 128, (8, 16), (False, True)),
        ("v6e:2x4", 3, (1, 3), (False, False)),
        ("v6e:2x4", 5, (2, 3), (False, False)),
        ("tpu7x:2x2x1", 8, (2, 2, 1), (False, False, False)),
        ("tpu7x:2x2x1", 2, (1, 1, 1), (False, False, False)),
        ("h200:8", 4, (4,), (False,)),
    ],
)
def test_the_best_connected_part(topology: str, num_devices: int, grid: tuple[int, ...], rings: tuple[bool]) -> None:
    part = wiring(parse_topology(topology), num_devices)
    assert (part.grid, part.rings) == (grid, rings)


def test_two_neighbours_send_each_other_all_they_sum_and_half_of_what_they_gather() -> None:
    assert seconds("v6e:1x2", 2, REDUCE) == pytest.approx(BIG / 100e9)
    assert seconds("v6e:1x2", 2, GATHER) == pytest.approx(BIG / 2 / 100e9)


def test_a_square_is_a_ring() -> None:
    """Eight one-way links carry 2 x 3 times the sum: what the best ring of four takes both ways around."""
    assert seconds("v5e:2x2", 4, REDUCE) == pytest.approx(2 * 3 * BIG / 8 / 50e9)
    assert seconds("v5e:2x2", 4, GATHER) == pytest.approx(3 * BIG / 8 / 50e9)
    assert seconds("v5p:2x2x1", 4, REDUCE) == pytest.approx(2 * 3 * BIG / 8 / 100e9)


def test_eight_chips_in_two_rows() -> None:
    """4 links across the rows and 2 x 3 along them, each way: 20. A corner gathers 7/8 over two of them."""
    assert seconds("v6e:2x4", 8, REDUCE) == pytest.approx(2 * 7 * BIG / 20 / 100e9)
    assert seconds("v6e:2x4", 8, GATHER) == pytest.approx(7 / 8 * BIG / 2 / 100e9)


def test_a_whole_pod_uses_both_axes_and_both_ways_around() -> None:
    """256 chips of 4 links; in the limit the n / (2 axes x 2 ways) x 2 of the textbook."""
    assert seconds("v6e:16x16", 256, REDUCE) == pytest.approx(2 * 255 * BIG / 1024 / 100e9)
    assert seconds("v6e:16x16", 256, REDUCE) == pytest.approx(BIG / 2 / 100e9, rel=0.01)


def test_a_cube_uses_three_axes() -> None:
    assert seconds("v5p:4x4x4", 64, REDUCE) == pytest.approx(2 * 63 * BIG / (64 * 6) / 100e9)


def test_a_long_line_is_as_slow_as_its_ends() -> None:
    assert seconds("v6e:1x8", 8, GATHER) == pytest.approx(7 / 8 * BIG / 100e9)
    assert seconds("v6e:1x8", 8, REDUCE) == pytest.approx(BIG / 100e9)


def test_two_devices_of_a_chip_have_links_of_their_own() -> None:
    assert seconds("tpu7x:2x2x1", 2, REDUCE) == pytest.approx(BIG / 600e9)
    assert seconds("tpu7x:2x2x1", 2, GATHER) == pytest.approx(BIG / 2 / 600e9)
    assert seconds("tpu7x:2x2x1", 8, REDUCE) == pytest.approx(2 * 3 * BIG / 8 / 100e9), "four chips share six links"


def test_switches_add_up() -> None:
    assert seconds("h100:8", 8, REDUCE) == pytest.approx(BIG / 450e9)
    assert seconds("h100:8", 8, GATHER) == pytest.approx(7 / 8 * BIG / 450e9)


@pytest.mark.parametrize(
    ("topology", "num_devices", "hops"),
    [("v6e:2x4", 8, 1 + 3), ("v6e:16x16", 256, 8 + 8), ("v5p:4x4x4", 64, 6), ("tpu7x:2x2x1", 8, 2), ("h100:8", 8, 1)],
)
def test_small_messages_take_as_long_as_their_way(topology: str, num_devices: int, hops: int) -> None:
    assert seconds(topology, num_devices, REDUCE, num_bytes=64, count=3) == pytest.approx(3 * hops * 1e-6)


def test_one_device_exchanges_nothing() -> None:
    assert seconds("v6e:2x4", 1, REDUCE) == 0
