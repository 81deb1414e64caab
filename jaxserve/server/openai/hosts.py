"""Which hosts a request may be for: a guard against DNS rebinding.

A web page anywhere may name a host of its own that resolves to 127.0.0.1, and so let the visitor's browser talk to a
server that listens there and trusts whoever reaches it. The browser still sends the page's host name, by which such
requests are known.
"""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.core.errors import MisdirectedError
from jaxserve.server.openai.errors import error_response

LOOPBACK = ("localhost", "*.localhost", "127.0.0.0/8", "::1")
"""Names and networks of this machine as it calls itself."""

ANY = "*"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback interface: a name or address, as in a URL or as listened on."""
    return _Hosts(LOOPBACK).has(host)


def hosts_of(allowed: tuple[str, ...] | None, *, listens_on: str) -> tuple[str, ...] | None:
    """The hosts that requests may be for.

    Args:
        allowed: The hosts that were asked for; None leaves it to where the server listens.
        listens_on: Address or name.

    Returns:
        Names, `*.name`s, addresses and networks; None for all.
    """
    if allowed is None:
        return LOOPBACK if is_loopback(listens_on) else None
    return None if ANY in allowed else (*allowed, *LOOPBACK)


class Hosts:
    """Lets only requests for some hosts through; one without a host (HTTP/1.0) comes from no browser and passes.

    Args:
        app: The next layer.
        hosts: Names, `*.name`s, addresses and networks.
    """

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = _Hosts(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and value and not self._hosts.has(_without_port(value.decode("latin-1"))):
                    shown = ascii(value.decode("latin-1")[:100])
                    error = MisdirectedError(
                        f"This server does not answer for the host {shown}; name it with --allowed-hosts.", param="host"
                    )
                    await error_response(error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


class _Hosts:
    """A set of hosts."""

    def __init__(self, hosts: tuple[str, ...]) -> None:
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for host in hosts:
            network = as_network(host)
            if network is None:
                self._names.add(host.lower())
            else:
                self._networks.append(network)
        self._suffixes = tuple(name[1:] for name in self._names if name.startswith("*."))

    def has(self, host: str) -> bool:
        """Whether the host, a name or an address without its port, is one of them."""
        name = host.lower().removesuffix(".")
        if name in self._names or name.endswith(self._suffixes):
            return True
        network = as_network(name)
        return network is not None and any(
            each.version == network.version and network.network_address in each for each in self._networks
        )


def as_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """An address or network from text, the address of IPv6 in brackets or not; None if it is neither."""
    try:
        network = ipaddress.ip_network(text.removeprefix("[").removesuffix("]"), strict=False)
    except ValueError:
        return None
    mapped = network.network_address.ipv4_mapped if network.version == 6 else None
    return network if mapped is None else ipaddress.ip_network(mapped)


def _without_port(host: str) -> str:
    """The host of a Host header."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
