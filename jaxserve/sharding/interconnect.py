"""How long exchanges between devices take at least: bounds that no schedule of them can beat.

A TPU's chips are wired to their neighbours in a grid whose axes close to rings under the rules of its generation; the
GPUs of a host hang on switches that can add up what passes. An exchange takes as long as the slowest of these: all
links together, the links of a corner, the links across the grid, and the way of a message from the farthest chip. A
schedule that meets all of them at once need not exist; every one of them holds.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass

from jaxserve.sharding.chips import Links
from jaxserve.sharding.topology import Topology


class ExchangeKind(enum.StrEnum):
    """What devices exchange, as HLO calls it."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Exchanges of one kind and size.

    Attributes:
        kind: All devices end with the sum of what each had, or with all the parts that each had one of.
        num_bytes: Bytes of the result on each device.
        count: How many there are, one after another.
    """

    kind: ExchangeKind
    num_bytes: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Devices that share a model, and what connects them.

    Attributes:
        links: The links of each of their chips.
        num_devices: How many there are.
        grid: How their chips lie; one number on a switch.
        rings: Whether each axis is closed.
    """

    links: Links
    num_devices: int
    grid: tuple[int, ...]
    rings: tuple[bool, ...]

    @property
    def num_chips(self) -> int:
        """Chips."""
        return math.prod(self.grid)

    def seconds(self, exchange: Exchange) -> float:
        """The least that exchanges take."""
        if self.num_devices == 1:
            return 0.0
        bound = self._on_switch if self.links.num_axes == 0 else self._on_grid
        return exchange.count * max(bound(exchange), self._hops() * self.links.hop_s)

    def _on_switch(self, exchange: Exchange) -> float:
        """A switch that adds up and sends to several takes each device's part once, and gives it the result once."""
        taken = _taken(exchange, 1 / self.num_devices)
        return taken / self.links.bytes_per_s

    def _on_grid(self, exchange: Exchange) -> float:
        chips = self.num_chips
        if chips == 1:
            return _taken(exchange, 1 / self.num_devices) / self.links.die_bytes_per_s
        lines = [chips // side for side in self.grid]
        sides = list(zip(self.grid, self.rings, lines, strict=True))
        # One way: each pair of neighbours is two.
        links = sum(2 * count * (side if ring else side - 1) for side, ring, count in sides)
        corner = sum(2 if ring else 1 for side, ring, _ in sides if side > 1)
        # All chips but one must get each byte; to be summed first, all but one must send it, too.
        sent = exchange.num_bytes * (chips - 1) * (2 if exchange.kind is ExchangeKind.ALL_REDUCE else 1)
        # What an outermost layer of an axis must take in, over the links that lead to it.
        across = [_taken(exchange, 1 / side) / (count * (2 if ring else 1)) for side, ring, count in sides if side > 1]
        return max(sent / links, _taken(exchange, 1 / chips) / corner, *across) / self.links.bytes_per_s

    def _hops(self) -> int:
        """Links between the two chips that are farthest apart."""
        if self.links.num_axes == 0:
            return 1
        return sum(side // 2 if ring else side - 1 for side, ring in zip(self.grid, self.rings, strict=True))


def _taken(exchange: Exchange, share: float) -> float:
    """Bytes that a part of the devices takes in: what it has not, which of a sum is all of the others' sum.

    Args:
        exchange: What all exchange.
        share: The part's share of the devices.
    """
    return exchange.num_bytes * (1 if exchange.kind is ExchangeKind.ALL_REDUCE else 1 - share)


def wiring(topology: Topology, num_devices: int) -> Wiring:
    """The best connected part of a slice that has so many devices.

    Args:
        topology: The slice.
        num_devices: At most the slice's.
    """
    links = topology.chip.links
    if links.num_axes == 0:
        return Wiring(links=links, num_devices=num_devices, grid=(num_devices,), rings=(False,))
    chips = -(-num_devices // topology.chip.devices_per_chip)
    boxes = [
        Wiring(links=links, num_devices=num_devices, grid=grid, rings=_rings(topology, grid))
        for grid in itertools.product(*(range(1, side + 1) for side in topology.grid))
        if math.prod(grid) >= chips
    ]
    probe = Exchange(kind=ExchangeKind.ALL_REDUCE, num_bytes=1 << 30, count=1)
    return min(boxes, key=lambda box: (box.num_chips, box.seconds(probe)))


def _rings(topology: Topology, grid: tuple[int, ...]) -> tuple[bool, ...]:
    """Which axes of a part of a slice are closed: those that the slice closes and that lie in the part whole."""
    return tuple(ring and side == whole for ring, side, whole in zip(topology.rings, grid, topology.grid, strict=True))
