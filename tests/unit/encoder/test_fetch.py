"""Media are fetched from allowed addresses only; a canary counts what must not reach it.

Everything is on loopback: 127.0.0.1 plays the public network, 127.0.0.2 the forbidden one.
"""

from __future__ import annotations

import ipaddress
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.errors import InvalidRequestError, MediaFetchError
from chiasm.encoder.fetch import FetchLimits, MediaFetcher
from chiasm.encoder.url_policy import UrlPolicy
from tests.fakes.media_server import (
    FakeResolver,
    MediaServer,
    broken,
    endless,
    respond,
    silent,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

PUBLIC = "127.0.0.1"
FORBIDDEN = "127.0.0.2"
MAX_BYTES = 100_000
TABLE = {
    "public.test": [[PUBLIC]],
    "private.test": [[FORBIDDEN]],
    "mixed.test": [[PUBLIC, FORBIDDEN]],
    "rebinding.test": [[PUBLIC], [FORBIDDEN]],
    "mapped.test": [[f"::ffff:{FORBIDDEN}"]],
}


@pytest_asyncio.fixture
async def public() -> AsyncIterator[MediaServer]:
    server = MediaServer({"/image.png": respond("200 OK", b"picture")})
    await server.start(PUBLIC)
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def canary(public: MediaServer) -> AsyncIterator[MediaServer]:
    server = MediaServer({"/image.png": respond("200 OK", b"secret")})
    await server.start(FORBIDDEN, public.port)
    yield server
    assert server.num_connections == 0
    await server.stop()


@asynccontextmanager
async def fetcher(
    table: Mapping[str, Sequence[Sequence[str]]] = TABLE, timeout_s: float = 5.0
) -> AsyncIterator[MediaFetcher]:
    """Yield a fetcher for which 127.0.0.1 is public."""
    policy = UrlPolicy(allowed_networks=(ipaddress.ip_network(f"{PUBLIC}/32"),))
    limits = FetchLimits(MAX_BYTES, max_redirects=3, timeout_s=timeout_s)
    client = MediaFetcher(policy, limits, FakeResolver(table))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def test_the_body_of_a_public_url_is_returned(public: MediaServer) -> None:
    async with fetcher() as client:
        body = await client.fetch(f"http://public.test:{public.port}/image.png")

    assert body == b"picture"
    assert public.hosts == [f"public.test:{public.port}"]


@pytest.mark.parametrize(
    "host", ["private.test", "mixed.test", "mapped.test", FORBIDDEN, "[::ffff:7f00:2]"]
)
async def test_forbidden_addresses_are_never_dialled(
    public: MediaServer, canary: MediaServer, host: str
) -> None:
    async with fetcher() as client:
        with pytest.raises(InvalidRequestError, match="not public") as caught:
            await client.fetch(f"http://{host}:{public.port}/image.png")

    assert caught.value.reason == "MEDIA_URL_FORBIDDEN"
    assert canary.num_connections == public.num_connections == 0


async def test_a_name_that_rebinds_is_checked_at_each_connection(
    public: MediaServer, canary: MediaServer
) -> None:
    url = f"http://rebinding.test:{public.port}/image.png"

    async with fetcher() as client:
        assert await client.fetch(url) == b"picture"
        with pytest.raises(InvalidRequestError, match="not public"):
            await client.fetch(url)

    assert canary.num_connections == 0


@pytest.mark.parametrize(
    "location",
    [
        "http://private.test:{port}/image.png",
        "//private.test:{port}/image.png",
        f"http://{FORBIDDEN}:{{port}}/image.png",
        "http://public.test:{port}@private.test:{port}/image.png",
        "http://private.test\\@public.test:{port}/",
        "file:///etc/passwd",
        "gopher://public.test:{port}/",
        "/\\private.test/image.png",
    ],
)
async def test_redirects_are_checked_like_urls(
    public: MediaServer, canary: MediaServer, location: str
) -> None:
    public.add("/go", respond("302 Found", Location=location.format(port=public.port)))

    async with fetcher() as client:
        with pytest.raises((InvalidRequestError, MediaFetchError)):
            await client.fetch(f"http://public.test:{public.port}/go")

    assert canary.num_connections == 0


@pytest.mark.parametrize("location", ["/image.png", "image.png", "//public.test:{port}/image.png"])
async def test_relative_redirects_are_followed(public: MediaServer, location: str) -> None:
    public.add("/go", respond("307 Temporary", Location=location.format(port=public.port)))

    async with fetcher() as client:
        assert await client.fetch(f"http://public.test:{public.port}/go") == b"picture"


async def test_three_redirects_are_followed_and_a_fourth_is_not(public: MediaServer) -> None:
    for hop in range(3):
        public.add(f"/{hop}", respond("301 Moved", Location=f"/{hop + 1}"))
    public.add("/3", respond("200 OK", b"there"))
    public.add("/start", respond("301 Moved", Location="/0"))

    async with fetcher() as client:
        assert await client.fetch(f"http://public.test:{public.port}/0") == b"there"
        with pytest.raises(MediaFetchError, match="more than 3 redirects"):
            await client.fetch(f"http://public.test:{public.port}/start")


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 408, 429, 500, 503])
async def test_other_statuses_are_the_clients_to_fix(public: MediaServer, status: int) -> None:
    public.add("/x", respond(f"{status} Oops"))

    async with fetcher() as client:
        with pytest.raises(MediaFetchError) as caught:
            await client.fetch(f"http://public.test:{public.port}/x")

    assert caught.value.message == f"Failed to fetch media from URL: HTTP {status} error"


async def test_a_body_of_the_largest_size_passes_and_one_byte_more_does_not(
    public: MediaServer,
) -> None:
    public.add("/fits", respond("200 OK", b"x" * MAX_BYTES))
    public.add("/large", respond("200 OK", b"x" * (MAX_BYTES + 1)))

    async with fetcher() as client:
        assert len(await client.fetch(f"http://public.test:{public.port}/fits")) == MAX_BYTES
        with pytest.raises(MediaFetchError, match="exceeds 100000 bytes"):
            await client.fetch(f"http://public.test:{public.port}/large")


async def test_an_endless_body_is_cut_off(public: MediaServer) -> None:
    public.add("/endless", endless)

    async with fetcher() as client:
        with pytest.raises(MediaFetchError, match="exceeds 100000 bytes"):
            await client.fetch(f"http://public.test:{public.port}/endless")


async def test_one_deadline_bounds_the_whole_fetch(public: MediaServer) -> None:
    public.add("/silent", silent)

    async with fetcher(timeout_s=0.1) as client:
        with pytest.raises(MediaFetchError, match=r"no answer within 0\.1 s"):
            await client.fetch(f"http://public.test:{public.port}/silent")


async def test_broken_answers_and_unknown_hosts_are_the_clients_to_fix(
    public: MediaServer,
) -> None:
    public.add("/broken", broken)
    public.add("/zip", respond("200 OK", b"bomb", Content_Encoding="gzip"))

    async with fetcher() as client:
        for url, detail in [
            (f"http://public.test:{public.port}/broken", "the connection failed"),
            (f"http://public.test:{public.port}/zip", "the answer is compressed"),
            ("http://unknown.test/", "the connection failed"),
            (f"http://public.test:{public.port}/image.png#x", ""),
        ]:
            if not detail:
                assert await client.fetch(url) == b"picture"
                continue
            with pytest.raises(MediaFetchError) as caught:
                await client.fetch(url)
            assert caught.value.message == f"Failed to fetch media from URL: {detail}"
