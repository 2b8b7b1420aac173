"""Media are fetched from allowed addresses only; a canary counts what must not reach it.

Everything is on loopback: 127.0.0.1 plays the public network, 127.0.0.2 the forbidden one.
"""

from __future__ import annotations

import asyncio
import ipaddress
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.errors import InvalidRequestError, MediaFetchError, OverloadedError
from chiasm.common.media import Modality
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
    table: Mapping[str, Sequence[Sequence[str]]] = TABLE,
    timeout_s: float = 5.0,
    max_fetches: int = 100,
) -> AsyncIterator[MediaFetcher]:
    """Yield a fetcher for which 127.0.0.1 is public."""
    policy = UrlPolicy(allowed_networks=(ipaddress.ip_network(f"{PUBLIC}/32"),))
    limits = FetchLimits(MAX_BYTES, 3, {Modality.IMAGE: timeout_s}, max_fetches)
    client = MediaFetcher(policy, limits, FakeResolver(table))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def fetch(client: MediaFetcher, url: str) -> bytes:
    """Fetch within a budget that nothing exceeds."""
    return bytes(await client.fetch(url, Modality.IMAGE, lambda num_bytes: None))


async def test_the_body_of_a_public_url_is_returned(public: MediaServer) -> None:
    async with fetcher() as client:
        body = await fetch(client, f"http://public.test:{public.port}/image.png")

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
            await fetch(client, f"http://{host}:{public.port}/image.png")

    assert caught.value.reason == "MEDIA_URL_FORBIDDEN"
    assert canary.num_connections == public.num_connections == 0


async def test_a_name_that_rebinds_is_checked_at_each_connection(
    public: MediaServer, canary: MediaServer
) -> None:
    url = f"http://rebinding.test:{public.port}/image.png"

    async with fetcher() as client:
        assert await fetch(client, url) == b"picture"
        with pytest.raises(InvalidRequestError, match="not public"):
            await fetch(client, url)

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
            await fetch(client, f"http://public.test:{public.port}/go")

    assert canary.num_connections == 0


@pytest.mark.parametrize("location", ["/image.png", "image.png", "//public.test:{port}/image.png"])
async def test_relative_redirects_are_followed(public: MediaServer, location: str) -> None:
    public.add("/go", respond("307 Temporary", Location=location.format(port=public.port)))

    async with fetcher() as client:
        assert await fetch(client, f"http://public.test:{public.port}/go") == b"picture"


async def test_three_redirects_are_followed_and_a_fourth_is_not(public: MediaServer) -> None:
    for hop in range(3):
        public.add(f"/{hop}", respond("301 Moved", Location=f"/{hop + 1}"))
    public.add("/3", respond("200 OK", b"there"))
    public.add("/start", respond("301 Moved", Location="/0"))

    async with fetcher() as client:
        assert await fetch(client, f"http://public.test:{public.port}/0") == b"there"
        with pytest.raises(MediaFetchError, match="more than 3 redirects"):
            await fetch(client, f"http://public.test:{public.port}/start")


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 408, 429, 500, 503])
async def test_other_statuses_are_the_clients_to_fix(public: MediaServer, status: int) -> None:
    public.add("/x", respond(f"{status} Oops"))

    async with fetcher() as client:
        with pytest.raises(MediaFetchError) as caught:
            await fetch(client, f"http://public.test:{public.port}/x")

    assert caught.value.message == f"Failed to fetch media from URL: HTTP {status} error"


async def test_a_body_of_the_largest_size_passes_and_one_byte_more_does_not(
    public: MediaServer,
) -> None:
    public.add("/fits", respond("200 OK", b"x" * MAX_BYTES))
    public.add("/large", respond("200 OK", b"x" * (MAX_BYTES + 1)))

    async with fetcher() as client:
        assert len(await fetch(client, f"http://public.test:{public.port}/fits")) == MAX_BYTES
        with pytest.raises(MediaFetchError, match="exceeds 100000 bytes"):
            await fetch(client, f"http://public.test:{public.port}/large")


async def test_an_endless_body_is_cut_off(public: MediaServer) -> None:
    public.add("/endless", endless)

    async with fetcher() as client:
        with pytest.raises(MediaFetchError, match="exceeds 100000 bytes"):
            await fetch(client, f"http://public.test:{public.port}/endless")


async def test_one_deadline_bounds_the_whole_fetch(public: MediaServer) -> None:
    public.add("/silent", silent)

    async with fetcher(timeout_s=0.1) as client:
        with pytest.raises(MediaFetchError, match=r"no answer within 0\.1 s"):
            await fetch(client, f"http://public.test:{public.port}/silent")


async def test_waiting_for_a_slot_is_not_in_the_deadline(public: MediaServer) -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await respond("200 OK", b"late")(writer)

    public.add("/slow", slow)
    url = f"http://public.test:{public.port}/slow"

    async with fetcher(timeout_s=0.5, max_fetches=1) as client:
        bodies = await asyncio.gather(*(fetch(client, url) for _ in range(3)))

    assert bodies == [b"late"] * 3


async def test_each_piece_is_charged_before_it_is_kept(public: MediaServer) -> None:
    public.add("/endless", endless)
    base = f"http://public.test:{public.port}"
    charged: list[int] = []

    def charge(num_bytes: int) -> None:
        charged.append(num_bytes)
        if sum(charged) > MAX_BYTES // 2:
            raise OverloadedError("full")

    async with fetcher() as client:
        with pytest.raises(OverloadedError):
            await client.fetch(f"{base}/endless", Modality.IMAGE, charge)
        charged.clear()
        body = await client.fetch(f"{base}/image.png", Modality.IMAGE, charge)

    assert sum(charged) == len(body) == len(b"picture")


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
                assert await fetch(client, url) == b"picture"
                continue
            with pytest.raises(MediaFetchError) as caught:
                await fetch(client, url)
            assert caught.value.message == f"Failed to fetch media from URL: {detail}"
