"""Who sends a request, and what that decides: whose share it counts against, its priority, which prefixes it shares.

A caller is known by its API key, without keys by its address. A trusted caller speaks for others: it may name the
client of each request in a header, and has kept their cached prefixes apart already. Keys are marked as trusted in
their own line (see `parse_line`), addresses by the setting `trusted_proxies`.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, replace
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import Scope

from jaxserve.core.errors import ConfigError, InvalidRequestError
from jaxserve.core.types import Request
from jaxserve.kv.salt import effective_salt
from jaxserve.server.openai.config import CallerPolicy

FAIRNESS_HEADER = "x-llm-d-inference-fairness-id"
"""Names the client of a request; it counts from trusted callers only."""

_CALLER = "jaxserve.caller"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BOUNDS = re.compile(r"(-?\d{1,6})\.\.(-?\d{1,6})")
_WEIGHT = re.compile(r"\d{1,4}(\.\d{1,3})?")
_ATTRIBUTES = frozenset({"name", "trusted", "priority", "weight"})
_IPV6_HOST_BITS = 64

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Whom a request comes from.

    Attributes:
        id: The client that its requests count against: the key's name or a hash of it, never the key; or an address.
        trusted: Whether it speaks for others.
        min_priority: Lowest (most urgent) priority that its requests may have.
        max_priority: Highest.
        weight: Its share of the service beside others' that have 1.
        key_id: Keeps its cached prefixes apart from those of others; empty if it shares.
    """

    id: str
    min_priority: int
    max_priority: int
    weight: float = 1.0
    trusted: bool = False
    key_id: str = ""

    def claim(self, request: Request) -> Request:
        """The request as this caller's: with its client and its salt.

        Raises:
            InvalidRequestError: The priority is not one that the caller may ask for.
        """
        if not self.min_priority <= request.priority <= self.max_priority:
            raise InvalidRequestError(
                f"priority must be in [{self.min_priority}, {self.max_priority}], the bounds that the server sets for "
                "this client.",
                param="priority",
            )
        return replace(request, client=self.id, cache_salt=effective_salt(self.key_id, request.cache_salt))


class Callers:
    """Everybody who may call, and how to tell them apart.

    Args:
        lines: API keys with their attributes, as `parse_line` takes them; none lets everybody in.
        policy: What holds for all.

    Raises:
        ConfigError: A line or the policy is wrong. No key is shown.
    """

    def __init__(self, lines: tuple[str, ...], policy: CallerPolicy) -> None:
        if not policy.min_priority <= 0 <= policy.max_priority:
            raise ConfigError("min_priority must be at most 0, the default priority, and max_priority at least 0.")
        self._policy = policy
        self._proxies = tuple(ip_network(text, strict=False) for text in policy.trusted_proxies)
        entries: dict[bytes, Caller] = {}
        for number, line in enumerate(lines, start=1):
            key, caller = parse_line(line, policy, number=number)
            if entries.setdefault(key, caller) != caller:
                raise ConfigError(
                    f"API key {number} stands in another line too, with other attributes.", param="api_key"
                )
        apart = len({caller.id for caller in entries.values()}) > 1 and not policy.share_prefix_cache
        self._entries = tuple(
            (key, replace(caller, key_id=caller.id if apart and not caller.trusted else ""))
            for key, caller in entries.items()
        )

    @property
    def ask_for_key(self) -> bool:
        """Whether a request must bring a key."""
        return bool(self._entries)

    @property
    def shares(self) -> dict[str, float]:
        """Each client's share of the service, for those whose key says one; of several keys of a name the largest."""
        shares: dict[str, float] = {}
        for _, caller in self._entries:
            shares[caller.id] = max(caller.weight, shares.get(caller.id, 0.0))
        return {client: share for client, share in shares.items() if share != 1.0}

    def admit(self, scope: Scope) -> bool:
        """Whether a request brings a known key as its bearer token; if so, `of` knows whose it is."""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared, each in constant time, so that timing says nothing about any of them.
        matches = [hmac.compare_digest(given, known) for known, _ in self._entries]
        if scheme.lower() != "bearer" or not any(matches):
            return False
        scope[_CALLER] = self._entries[matches.index(True)][1]
        return True

    def of(self, scope: Scope) -> Caller:
        """Whom a request comes from; where keys are asked for it has been admitted."""
        headers = Headers(scope=scope)
        caller: Caller = scope[_CALLER] if self._entries else self._at_address(scope, headers)
        named = headers.get(FAIRNESS_HEADER, "") if caller.trusted else ""
        return replace(caller, id=f"client:{_digest(named)}") if named else caller

    def _at_address(self, scope: Scope, headers: Headers) -> Caller:
        peer = _address(scope["client"][0]) if scope.get("client") else None
        address, trusted = peer, peer is not None and self._is_proxy(peer)
        if trusted:
            address = self._forwarded(headers, peer)
        bounds = self._policy
        return Caller(
            id=f"address:{_network(address)}",
            trusted=trusted,
            min_priority=bounds.min_priority,
            max_priority=bounds.max_priority,
        )

    def _forwarded(self, headers: Headers, peer: Address | None) -> Address | None:
        """The address that a trusted proxy saw; what stands left of it in the header anybody could have written."""
        for text in reversed(",".join(headers.getlist("x-forwarded-for")).split(",")):
            address = _address(text.strip())
            if address is None:
                break
            if not self._is_proxy(address):
                return address
        return peer

    def _is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self._proxies)


def parse_line(line: str, policy: CallerPolicy, *, number: int = 1) -> tuple[bytes, Caller]:
    """Reads `KEY [name=NAME] [trusted] [priority=LOW..HIGH] [weight=N]`.

    Args:
        line: The key and its attributes, between blanks. Keys of one name are one client; without a name a key is a
            client of its own.
        policy: Bounds of the priority for keys that have none of their own.
        number: Of the line, for errors.

    Returns:
        The key's bytes and whose it is; `key_id` is left open.

    Raises:
        ConfigError: There is no key, or an attribute is unknown, wrong or given twice. The line is not shown.
    """
    key, *attributes = line.split() or [""]
    wrong = ConfigError(
        f"API key {number} is not of the form KEY [name=NAME] [trusted] [priority=LOW..HIGH] [weight=N], with a NAME "
        "of letters, digits, dots, dashes and underscores, LOW <= 0 <= HIGH, and 0 < N < 10000.",
        param="api_key",
    )
    given = dict(attribute.partition("=")[::2] for attribute in attributes)
    if not key or len(given) < len(attributes) or not given.keys() <= _ATTRIBUTES:
        raise wrong
    bounds = _BOUNDS.fullmatch(given.get("priority", f"{policy.min_priority}..{policy.max_priority}"))
    name, weight = given.get("name"), given.get("weight", "1")
    if bounds is None or given.get("trusted") or (name is not None and not _NAME.fullmatch(name)):
        raise wrong
    low, high = int(bounds[1]), int(bounds[2])
    if not low <= 0 <= high or not _WEIGHT.fullmatch(weight) or not float(weight):
        raise wrong
    encoded = key.encode("utf-8", "surrogateescape")
    return encoded, Caller(
        id=f"key:{_digest(key)}" if name is None else f"name:{name}",
        trusted="trusted" in given,
        min_priority=low,
        max_priority=high,
        weight=float(weight),
    )


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _address(text: str) -> Address | None:
    """An address, as IPv4 if it is that in an IPv6 coat; None if it is none, as with a Unix socket."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _network(address: Address | None) -> str:
    """What counts as one client: an IPv4 address, or the /64 that an IPv6 host can take any address of."""
    if address is None:
        return "unknown"
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((int(address) >> _IPV6_HOST_BITS << _IPV6_HOST_BITS, 128 - _IPV6_HOST_BITS)))
