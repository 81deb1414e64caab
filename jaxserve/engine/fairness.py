"""Fair shares of the service between clients: a virtual token counter a client (VTC, arXiv:2401.00588).

A client's counter grows by what it is served: `input_weight` for each prompt token that is computed (found in a prefix
cache costs nothing), `output_weight` for each token generated, divided by the client's share. Whoever has the smallest
counter goes next. A client that comes back is lifted to the level of those who wait already, so being away earns no
credit. Then clients that always have something waiting differ in service by at most

    2 * max(input_weight * longest prompt, output_weight * tokens that all running sequences can generate)

With a half-life, what was served in the past counts for less and less: counters then hold log2 of the decayed service,
scaled so that they need no update as time goes by.

Host bookkeeping only, for an engine's queue or a router's; a client is any string.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxserve.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessConfig:
    """How service is measured.

    Attributes:
        input_weight: Cost of a prompt token that is computed.
        output_weight: Cost of a generated token.
        half_life_s: Seconds after which service counts half; 0 keeps it all.
        shares: Client to its share, positive; 1 for those not named.
        max_idle: Most clients remembered that have nothing in flight.
    """

    input_weight: float = 1.0
    output_weight: float = 2.0
    half_life_s: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    max_idle: int = 4096

    def __post_init__(self) -> None:
        if not all(0 < weight < math.inf for weight in (self.input_weight, self.output_weight, *self.shares.values())):
            raise ConfigError("weights and shares of clients must be positive and finite")
        if not 0 <= self.half_life_s < math.inf or self.max_idle < 0:
            raise ConfigError("half_life_s must be finite and, as max_idle, not negative")


class Account:
    """What one client was served, and what it has in flight.

    Attributes:
        client: Its name.
        share: Its service counts divided by this.
        output_tokens: Tokens generated for it that its counter does not hold yet; whoever generates adds to it.
        num_live: Its sequences (or requests) that have not ended.
        num_waiting: Of those, how many wait; kept by whoever queues them.
    """

    __slots__ = ("_counter", "client", "num_live", "num_waiting", "output_tokens", "share")

    def __init__(self, client: str, share: float, counter: float) -> None:
        self.client = client
        self.share = share
        self.output_tokens = 0
        self.num_live = 0
        self.num_waiting = 0
        self._counter = counter


class VirtualTokenCounter:
    """The counters of all clients.

    Args:
        config: How service is measured.
        clock: Seconds, monotonic; matters with a half-life only.
    """

    def __init__(self, config: FairnessConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._idle: OrderedDict[str, Account] = OrderedDict()

    @property
    def zero(self) -> float:
        """The counter of a client that was never served."""
        return -math.inf if self._config.half_life_s else 0.0

    @property
    def num_accounts(self) -> int:
        """Clients that are remembered."""
        return len(self._accounts)

    def find(self, client: str) -> Account | None:
        """The account of a client that is remembered."""
        return self._accounts.get(client)

    def open(self, client: str, count: int = 1) -> Account:
        """The account of a client that has `count` more sequences in flight."""
        account = self._accounts.get(client)
        if account is None:
            account = Account(client, self._config.shares.get(client, 1.0), self.zero)
            self._accounts[client] = account
        elif account.num_live == 0:
            del self._idle[client]
        account.num_live += count
        return account

    def close(self, account: Account, floor: Callable[[], float]) -> None:
        """One of the client's sequences has ended.

        A client without any is forgotten as soon as its counter could not matter on its return.

        Args:
            account: The client's.
            floor: The least counter that whoever arrives now would be lifted to.
        """
        account.num_live -= 1
        if account.num_live:
            return
        self._idle[account.client] = account
        lowest = floor()
        if self.counter(account) <= lowest:
            self._forget(account)
        while self._idle:
            oldest = next(iter(self._idle.values()))
            if len(self._idle) <= self._config.max_idle and self.counter(oldest) > lowest:
                return
            self._forget(oldest)

    def counter(self, account: Account) -> float:
        """What orders clients: the smallest goes next. Never falls."""
        if account.output_tokens:
            self._charge(account, self._config.output_weight * account.output_tokens)
            account.output_tokens = 0
        return account._counter

    def lift(self, account: Account, level: float) -> None:
        """The client comes back and gets no credit for having been away.

        Args:
            account: The client's.
            level: The counter of somebody who waits already, or of the last who did.
        """
        account._counter = max(self.counter(account), level)

    def charge_input(self, account: Account, num_tokens: int) -> None:
        """The client is served a prompt of which so many tokens have to be computed."""
        if num_tokens:
            self._charge(account, self._config.input_weight * num_tokens)

    def _charge(self, account: Account, cost: float) -> None:
        cost /= account.share
        half_life_s = self._config.half_life_s
        if not half_life_s:
            account._counter += cost
            return
        # log2(2**a + 2**b), with the service of now scaled up instead of all that was before scaled down.
        low, high = sorted((account._counter, math.log2(cost) + self._clock() / half_life_s))
        account._counter = high + math.log2(1.0 + 2.0 ** (low - high))

    def _forget(self, account: Account) -> None:
        del self._idle[account.client]
        del self._accounts[account.client]

    def check_integrity(self) -> None:
        """Raises AssertionError unless those with nothing in flight are the idle ones, and few."""
        assert {a.client for a in self._accounts.values() if not a.num_live} == set(self._idle)
        assert len(self._idle) <= self._config.max_idle
        assert all(0 <= a.num_waiting <= a.num_live for a in self._accounts.values())
