"""Decide which media URLs may be fetched, and from which addresses.

A URL is parsed once, by the parser of the HTTP client, after everything on which parsers disagree
has been refused. Addresses are checked against the table below, not against what the standard
library calls global, which lets multicast, NAT64 and others through.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TypeAlias

from yarl import URL

from chiasm.common.errors import InvalidRequestError

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

_MAX_URL_CHARS = 8192
_UNSAFE_CHARS = re.compile(r"[\x00-\x20\x7f\\]")
_AUTHORITY = re.compile(
    r"https?://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?=[/?#]|$)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")

_FORBIDDEN_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, metadata services
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # multicast tunnels
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_FORBIDDEN_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """What may be fetched.

    Attributes:
        allowed_domains: Host names, lower case, that URLs must name; empty allows every host.
        allowed_networks: Networks that may be dialled although they are not public.
    """

    allowed_domains: frozenset[str] = frozenset()
    allowed_networks: tuple[Network, ...] = ()

    def parse(self, text: str) -> URL:
        """Return the URL that ``text`` spells, if it may be fetched.

        A host given as an address is checked here; for a name, ``check_address`` must be asked
        about every address that it resolves to.

        Raises:
            InvalidRequestError: The URL is malformed, ambiguous or forbidden.
        """
        url = _parse_unambiguous(text)
        host = url.raw_host or ""
        if self.allowed_domains and host not in self.allowed_domains:
            raise InvalidRequestError(
                f"The URL must be from one of the allowed domains:"
                f" {sorted(self.allowed_domains)}. Input URL domain: {host}",
                reason="MEDIA_URL_FORBIDDEN",
            )
        address = _parse_address(host)
        if address is not None:
            self.check_address(address)
        return url

    def check_address(self, address: Address) -> None:
        """Raise ``InvalidRequestError`` if ``address`` must not be dialled."""
        effective = _unwrap(address)
        if any(effective in network for network in self.allowed_networks):
            return
        if not _is_public(effective):
            raise InvalidRequestError(
                "The media URL leads to an address that is not public.",
                reason="MEDIA_URL_FORBIDDEN",
            )


def _parse_unambiguous(text: str) -> URL:
    if len(text) > _MAX_URL_CHARS:
        raise _malformed(f"it has more than {_MAX_URL_CHARS} characters")
    if _UNSAFE_CHARS.search(text):
        raise _malformed("it contains a backslash, a space or a control character")
    match = _AUTHORITY.match(text)
    if match is None:
        raise _malformed("it does not name a host and optionally a port")
    host = match["host"].lower()
    _check_host(host)
    try:
        url = URL(text)
        is_same = url.raw_host == host.strip("[]") and url.explicit_port == (
            int(match["port"]) if match["port"] else None
        )
    except ValueError:
        is_same = False
    if not is_same or url.raw_user is not None or url.raw_password is not None:
        raise _malformed("its host is ambiguous")
    return url


def _check_host(host: str) -> None:
    if host.startswith("["):
        if _parse_address(host.strip("[]")) is None:
            raise _malformed("its host is not an IPv6 address")
        return
    labels = host.split(".")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        if _parse_address(host) is None:
            raise _malformed("its host is not an IPv4 address in dotted decimal form")
    elif len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _malformed("its host is not a host name")


def _parse_address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _unwrap(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _FORBIDDEN_IPV4)
    is_global_unicast = address in _PUBLIC_IPV6 and address.scope_id is None
    return is_global_unicast and not any(address in network for network in _FORBIDDEN_IPV6)


def _malformed(detail: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The media URL cannot be used: {detail}.", reason="INVALID_MEDIA_URL"
    )
