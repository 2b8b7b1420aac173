"""Fetch media over http and https, within one URL policy, a byte cap and one deadline."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from chiasm.common.errors import InvalidRequestError, MediaFetchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chiasm.common.media import Modality
    from chiasm.encoder.url_policy import UrlPolicy

_REDIRECTS = (301, 302, 303, 307, 308)
_READ_BYTES = 1 << 16


class Resolver(Protocol):
    """Looks host names up."""

    async def resolve(self, host: str) -> Sequence[str]:
        """Return every address of ``host``; raise ``OSError`` if there is none."""
        ...


class SystemResolver:
    """Looks host names up as the operating system does."""

    async def resolve(self, host: str) -> Sequence[str]:
        """Return every address of ``host``; raise ``OSError`` if there is none."""
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return [str(info[4][0]) for info in infos]


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch: bytes of the body, redirects followed, seconds in all by modality.

    At most ``max_fetches`` go on at one time; the time of the others begins when they do.
    """

    max_bytes: int
    max_redirects: int
    timeouts_s: Mapping[Modality, float]
    max_fetches: int = 100


class MediaFetcher:
    """Fetches media; every address is checked before it is dialled, and only it is dialled."""

    def __init__(self, policy: UrlPolicy, limits: FetchLimits, resolver: Resolver) -> None:
        self._policy = policy
        self._limits = limits
        self._resolver = _CheckedResolver(policy, resolver)
        self._slots = asyncio.Semaphore(limits.max_fetches)
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the connection pool; needs a running event loop."""
        # The slots bound the connections; waiting inside the connector would eat up the timeout.
        connector = aiohttp.TCPConnector(resolver=self._resolver, use_dns_cache=False, limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            # A compressed body could unpack to any size; pictures gain nothing from it.
            headers={"Accept-Encoding": "identity", "User-Agent": "chiasm"},
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def stop(self) -> None:
        """Close the connection pool."""
        if self._session is not None:
            await self._session.close()

    async def fetch(self, url: str, modality: Modality, charge: Callable[[int], None]) -> bytearray:
        """Return the body behind ``url``.

        Args:
            url: URL of any form; the policy judges it.
            modality: Kind of the item; decides how long the fetch may take.
            charge: Called with the bytes of each piece before it is kept; what it raises ends the
                fetch.

        Raises:
            InvalidRequestError: The URL, or one it redirects to, is malformed or forbidden.
            MediaFetchError: There is no usable answer within the limits.
        """
        timeout_s = self._limits.timeouts_s[modality]
        try:
            async with self._slots, asyncio.timeout(timeout_s):
                return await self._follow(url, charge)
        except TimeoutError:
            raise _failed(f"no answer within {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            if isinstance(error.__cause__, _ForbiddenAddressError):
                raise error.__cause__.error from None
            raise _failed("the connection failed") from None

    async def _follow(self, text: str, charge: Callable[[int], None]) -> bytearray:
        url = self._policy.parse(text)
        for _ in range(self._limits.max_redirects + 1):
            target = await self._get(url, charge)
            if isinstance(target, bytearray):
                return target
            url = self._policy.parse(target)
        raise _failed(f"more than {self._limits.max_redirects} redirects")

    async def _get(self, url: URL, charge: Callable[[int], None]) -> bytearray | str:
        """Return the body, or the URL that the answer redirects to."""
        assert self._session is not None, "start() comes first"
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS:
                return _redirect_target(url, response.headers.get("Location", ""))
            if response.status != 200:
                raise _failed(f"HTTP {response.status} error")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise _failed("the answer is compressed")
            return await self._read(response, charge)

    async def _read(
        self, response: aiohttp.ClientResponse, charge: Callable[[int], None]
    ) -> bytearray:
        max_bytes = self._limits.max_bytes
        body = bytearray()
        if (response.content_length or 0) > max_bytes:
            raise _failed(f"Remote media download exceeds {max_bytes} bytes")
        async for piece in response.content.iter_chunked(_READ_BYTES):
            if len(body) + len(piece) > max_bytes:
                raise _failed(f"Remote media download exceeds {max_bytes} bytes")
            charge(len(piece))
            body += piece
        return body


class _ForbiddenAddressError(OSError):
    """Carries the policy's verdict through the HTTP client, which lets only OSError pass."""

    def __init__(self, error: InvalidRequestError) -> None:
        super().__init__("forbidden address")
        self.error = error


class _CheckedResolver(AbstractResolver):
    """Answers the HTTP client's look-ups with checked addresses, or not at all."""

    def __init__(self, policy: UrlPolicy, resolver: Resolver) -> None:
        self._policy = policy
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of ``host`` if every one of them may be dialled."""
        addresses = [ipaddress.ip_address(text) for text in await self._resolver.resolve(host)]
        for address in addresses:
            try:
                self._policy.check_address(address)
            except InvalidRequestError as error:
                raise _ForbiddenAddressError(error) from None
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Do nothing; the look-ups hold nothing open."""


def _redirect_target(url: URL, location: str) -> str:
    # A whole URL is passed on as the server wrote it: the policy must see the original text.
    if location.startswith("//"):
        return f"{url.scheme}:{location}"
    if "\\" in location or "://" in location.split("?", 1)[0]:
        return location
    try:
        return str(url.join(URL(location)))
    except ValueError:
        raise _failed("the redirect is malformed") from None


def _failed(detail: str) -> MediaFetchError:
    return MediaFetchError(f"Failed to fetch media from URL: {detail}")
