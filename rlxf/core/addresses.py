"""Addresses of HTTP services: which ones may be called, and how they are written in messages."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

# Link-local networks, where cloud machines find their metadata and with it their credentials, and the metadata
# services of some clouds that have an address of another kind.
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "fd20:ce::254/128", "100.100.100.200/32")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address inside an IPv6 one


def is_link_local(host: str) -> bool:
    """Whether a literal address is link-local or that of a cloud's metadata service; False for a name."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            address = ipaddress.IPv6Address(int(address))  # without the zone, which no network contains
    return any(address in network for network in _REFUSED)


def refusal(host: str) -> str:
    """What is said of a host that leads to a link-local address."""
    return f"{host} is a link-local or metadata address, which is refused unless allow_link_local is true"


def short_url(url: str) -> str:
    """The address for messages: without a query, which may hold a key, and without user and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return repr(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def url_problem(url: str, *, allow_link_local: bool = False) -> str | None:
    """What is wrong with the address of a service, in words for the user; None if it can be called."""
    expected = "expected an http or https address, such as http://host:8000/score"
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # raises for one that is no number
    except ValueError as error:
        return f"{expected}, got {url!r} ({error})"
    if parts.username is not None or parts.password is not None:
        return "the address holds a user or a password; name an environment variable with a token in token_env instead"
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() or not c.isprintable() for c in url):
        return f"{expected}, got {url!r}"
    if not allow_link_local and is_link_local(host):
        return refusal(host)
    return None
