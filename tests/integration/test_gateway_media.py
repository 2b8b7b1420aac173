"""``/v1/media`` of a gateway between fakes, with a real Redis: put, get, delete, list, forget."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.embedding_store import EmbeddingStore
from chiasm.common.errors import InvalidRequestError
from tests.fakes.encoder_service import NUM_IMAGE_TOKENS
from tests.harness.gateway import Gateway, image_part, run_gateway
from tests.harness.media_api import MediaApi, data_url, keep_in_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

WAIT_S = 5.0


@pytest_asyncio.fixture
async def gateway(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Gateway]:
    keys = tmp_path / "keys"
    keys.write_text("alice key-a\nbob key-b\n")
    flags = ["--redis-url", redis_server.url, "--api-keys-file", str(keys)]
    async with run_gateway(tmp_path, [*flags, "--max-media-ttl-s", "1000"]) as running:
        running.say("fine")
        keep_in_store(running, tmp_path, redis_server.url)
        yield running


@pytest.fixture
def alice(gateway: Gateway) -> MediaApi:
    return MediaApi(gateway, "key-a")


@pytest.fixture
def bob(gateway: Gateway) -> MediaApi:
    return MediaApi(gateway, "key-b")


async def ask(gateway: Gateway, uuid: str, **fields: object) -> int:
    """Send a chat of Alice's that names the image ``uuid``; return the status."""
    part = {"type": "image_url", "image_url": None, "uuid": uuid}
    message = {"role": "user", "content": [part]}
    body = {"model": "tiny", "messages": [message], **fields}
    return (await gateway.post(body, {"authorization": "Bearer key-a"})).status


async def test_what_was_put_is_described_and_used_by_chats(
    gateway: Gateway, alice: MediaApi
) -> None:
    put = await alice.put(b"cat", uuid="cats/one%20a", modality="image")
    got = await alice.get("cats/one%20a")

    assert put.status == 200
    usage = put.json()["usage"]
    assert usage == {
        "uuid": "cats/one%20a",
        "modality": "image",
        "tokens": NUM_IMAGE_TOKENS,
        "cache": "miss",
        "fetch_ms": 250.0,
        "decode_ms": 500.0,
        "encode_ms": 3000.0,
    }
    media = got.json()
    assert media == {name: value for name, value in put.json().items() if name != "usage"}
    assert (media["object"], media["modality"], media["bytes"]) == ("media", "image", 3)
    assert media["tokens"] == NUM_IMAGE_TOKENS
    assert abs(media["created_at"] - time.time()) < 10
    assert abs(media["expires_at"] - media["created_at"] - media["ttl_s"]) < 10
    assert media["ttl_s"] == 24 * 3600
    assert await ask(gateway, "cats/one%20a") == 200
    assert gateway.encoder.sources == [b"cat"]


async def test_a_form_is_as_good_as_json(alice: MediaApi) -> None:
    first = await alice.put_form(b"cat", uuid="cat", ttl_s="60")
    second = await alice.put(b"cat", uuid="cat", ttl_s=60)

    assert first.status == second.status == 200
    assert first.json()["ttl_s"] == 60
    assert first.json()["usage"]["cache"] == "miss"
    assert second.json()["usage"]["cache"] == "hit"
    assert second.json()["usage"]["encode_ms"] == 0


async def test_an_object_without_a_uuid_gets_one(alice: MediaApi) -> None:
    uuids = [(await alice.put(b"cat")).json()["uuid"] for _ in range(2)]

    assert len(set(uuids)) == 2
    assert all([(await alice.get(uuid)).status == 200 for uuid in uuids])


@pytest.mark.parametrize("uuid", ["a" * 512, "a/../b", "/", "a?b#c", "%2F", "100%25", "x:estimate"])
async def test_any_name_of_the_grammar_can_be_put_got_and_deleted(
    alice: MediaApi, uuid: str
) -> None:
    assert (await alice.put(b"cat", uuid=uuid)).status == 200
    assert (await alice.get(uuid)).json()["uuid"] == uuid
    assert (await alice.delete(uuid)).json() == {"uuid": uuid, "object": "media", "deleted": True}
    assert (await alice.get(uuid)).status == 404


async def test_other_content_under_a_known_name_is_a_conflict(alice: MediaApi) -> None:
    await alice.put(b"cat", uuid="cat")

    reply = await alice.put(b"dog", uuid="cat")

    assert reply.status == 409
    assert reply.error["code"] == "uuid_conflict"
    assert reply.headers["x-should-retry"] == "false"
    assert (await alice.get("cat")).json()["bytes"] == 3


async def test_what_is_deleted_is_unknown_to_chats_and_to_everyone(
    gateway: Gateway, alice: MediaApi, redis_server: RedisServer
) -> None:
    await alice.put(b"cat", uuid="cat")

    assert (await alice.delete("cat")).status == 200

    gone, again = await alice.get("cat"), await alice.delete("cat")
    assert (gone.status, gone.error["code"], gone.error["param"]) == (
        404,
        "media_not_found",
        "uuid",
    )
    assert again.status == 404
    assert await ask(gateway, "cat") == 400
    assert await redis_server.keys() == []


async def test_other_names_of_deleted_content_lose_it(alice: MediaApi) -> None:
    await alice.put(b"cat", uuid="one")
    await alice.put(b"cat", uuid="two")

    await alice.delete("one")

    assert (await alice.get("two")).status == 404
    assert (await alice.put(b"cat", uuid="two")).json()["usage"]["cache"] == "miss"
    assert (await alice.get("two")).status == 200


async def test_tenants_neither_see_nor_delete_nor_use_what_others_have(
    gateway: Gateway, alice: MediaApi, bob: MediaApi
) -> None:
    await bob.put(b"cat", uuid="cat")

    assert (await alice.get("cat")).status == 404
    assert (await alice.delete("cat")).status == 404
    assert (await alice.list()).json()["data"] == []
    assert (await alice.forget()).json()["count"] == 0
    assert await ask(gateway, "cat") == 400
    assert (await alice.put(b"dog", uuid="cat")).status == 200
    assert (await bob.get("cat")).status == 200
    assert (await MediaApi(gateway).get("cat")).status == 401


async def test_a_salt_keeps_names_apart(gateway: Gateway, alice: MediaApi) -> None:
    await alice.put(b"cat", uuid="cat", cache_salt="s1")

    assert (await alice.get("cat")).status == 404
    assert (await alice.get("cat", "?cache_salt=s1")).status == 200
    assert (await alice.list()).json()["data"] == []
    listed = (await alice.list("?cache_salt=s1")).json()["data"]
    assert [media["uuid"] for media in listed] == ["cat"]
    assert await ask(gateway, "cat") == 400
    assert await ask(gateway, "cat", cache_salt="s1") == 200
    assert (await alice.delete("cat", "?cache_salt=s1")).status == 200


async def test_pages_together_hold_everything_once(alice: MediaApi) -> None:
    for number in range(7):
        await alice.put(b"cat %d" % number, uuid=f"cat-{number}")

    uuids, query, sizes = [], "?limit=3", []
    while True:
        page = (await alice.list(query)).json()
        sizes.append(len(page["data"]))
        uuids += [media["uuid"] for media in page["data"]]
        if not page["has_more"]:
            break
        query = f"?limit=3&after={page['last_id']}"

    assert sorted(uuids) == [f"cat-{number}" for number in range(7)]
    assert max(sizes) <= 3
    assert page["last_id"] is None


async def test_named_media_of_chats_are_objects_too(gateway: Gateway, alice: MediaApi) -> None:
    message = {"role": "user", "content": [image_part(b"cat", uuid="chat-cat")]}
    await gateway.post({"model": "tiny", "messages": [message]}, {"authorization": "Bearer key-a"})

    media = (await alice.get("chat-cat")).json()

    assert (media["bytes"], media["tokens"]) == (3, NUM_IMAGE_TOKENS)
    assert [one["uuid"] for one in (await alice.list()).json()["data"]] == ["chat-cat"]


async def test_forgetting_everything_must_be_said_and_leaves_nothing(
    alice: MediaApi, bob: MediaApi
) -> None:
    await alice.put(b"cat", uuid="cat")
    await alice.put(b"dog", uuid="dog")
    await bob.put(b"cat", uuid="cat")

    refused = [await alice.forget(query) for query in ("", "?all=true&cache_salt=x")]
    forgotten = await alice.forget()

    assert [one.error["param"] for one in refused] == ["all", "cache_salt"]
    assert forgotten.json() == {"object": "list", "deleted": True, "count": 2}
    assert (await alice.list()).json()["data"] == []
    assert (await bob.get("cat")).status == 200


async def test_a_time_is_clamped_and_holds_for_name_and_embedding(
    gateway: Gateway, alice: MediaApi, redis_server: RedisServer
) -> None:
    long = (await alice.put(b"cat", uuid="cat", ttl_s=100_000)).json()
    short = (await alice.put(b"dog", uuid="dog", ttl_s=5)).json()

    assert long["ttl_s"] == 1000
    assert short["ttl_s"] == 5
    assert 0 <= short["expires_at"] - time.time() + 1 <= 7
    assert await ask(gateway, "dog") == 200  # a use does not make it longer than that
    lives = [await redis_server.admin.pttl(key) / 1000 for key in await redis_server.keys()]
    assert sum(left_s <= 5 for left_s in lives) == 2  # the name and the manifest
    assert max(lives) <= 2000


async def test_a_short_name_of_content_that_is_kept_longer_ends_in_its_own_time(
    alice: MediaApi,
) -> None:
    await alice.put(b"cat", uuid="long")

    short = (await alice.put(b"cat", uuid="short", ttl_s=5)).json()

    assert short["expires_at"] - time.time() <= 5
    assert (await alice.get("long")).json()["expires_at"] - time.time() > 1000


async def test_an_evicted_embedding_is_no_object(
    alice: MediaApi, redis_server: RedisServer
) -> None:
    await alice.put(b"cat", uuid="cat")
    for key in await redis_server.keys(":m"):
        await redis_server.admin.delete(key)

    assert (await alice.get("cat")).status == 404
    assert (await alice.list()).json()["data"] == []


async def test_an_estimate_costs_nothing_and_keeps_nothing(
    gateway: Gateway, alice: MediaApi, redis_server: RedisServer
) -> None:
    body = {"url": data_url(b"cat"), "uuid": "cat"}
    before = await alice.post("/v1/media:estimate", body)
    keys = await redis_server.keys()
    await alice.put(b"cat", uuid="cat")
    after = await alice.post("/v1/media:estimate", body)
    named = await alice.post("/v1/media:estimate", {"uuid": "cat", "modality": "image"})
    unknown = await alice.post("/v1/media:estimate", {"uuid": "dog", "modality": "image"})

    assert keys == []
    assert before.json() == {
        "object": "media.estimate",
        "tokens": NUM_IMAGE_TOKENS,
        "pixels": 3,
        "queue_units": 6,
        "cache": "miss",
    }
    assert after.json() == named.json()
    assert (named.json()["cache"], named.json()["queue_units"]) == ("hit", 0)
    assert (unknown.status, unknown.error["code"]) == (400, "media_not_found")
    assert gateway.encoder.sources == [b"cat"]


async def test_a_client_that_goes_away_ends_the_encode(gateway: Gateway, alice: MediaApi) -> None:
    gateway.encoder.ready.clear()
    put = asyncio.create_task(alice.put(b"cat", uuid="cat"))
    await asyncio.wait_for(gateway.encoder.started.wait(), WAIT_S)

    put.cancel()

    assert await asyncio.wait_for(gateway.encoder.cancelled.wait(), WAIT_S)


async def test_a_client_that_goes_away_amid_a_write_to_the_store_leaves_no_connection(
    gateway: Gateway, alice: MediaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_chunks = asyncio.Event()

    async def never_end(*_: object) -> None:
        has_chunks.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(EmbeddingStore, "_write_manifest", never_end)
    put = asyncio.create_task(alice.put(b"cat", uuid="cat"))
    await asyncio.wait_for(has_chunks.wait(), WAIT_S)

    put.cancel()  # a connection that nobody closes fails this test as a ResourceWarning

    assert await asyncio.wait_for(gateway.encoder.cancelled.wait(), WAIT_S)


async def test_an_error_of_the_encoder_reaches_the_client(
    gateway: Gateway, alice: MediaApi
) -> None:
    gateway.encoder.errors[b"cat"] = InvalidRequestError("It is no image.", reason="INVALID_MEDIA")

    put = await alice.put(b"cat", uuid="cat")
    estimate = await alice.post("/v1/media:estimate", {"url": data_url(b"cat")})

    assert (put.status, put.error["code"]) == (estimate.status, estimate.error["code"])
    assert (put.status, put.error["code"]) == (400, "invalid_media")


async def test_without_a_working_store_nothing_is_said_to_be_kept(
    gateway: Gateway, alice: MediaApi, redis_server: RedisServer
) -> None:
    gateway.encoder.is_inline = True
    gateway.encoder.keep = None
    await redis_server.kill()

    replies = [
        await alice.put(b"cat", uuid="cat"),
        await alice.get("cat"),
        await alice.delete("cat"),
        await alice.list(),
        await alice.forget(),
    ]

    assert [reply.status for reply in replies] == [503] * 5
    assert {reply.error["code"] for reply in replies} == {"store_unavailable"}
    assert all("retry-after" in reply.headers for reply in replies)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        ({"uuid": "cat", "modality": "image"}, "media"),
        ({"url": "data:image/png;base64,", "uuid": "cat"}, "media"),
        ({"url": "https://h/a.png"}, "modality"),
        ({"url": "https://h/a.png", "modality": "smell"}, "modality"),
        ({"url": "https://h/a.png", "modality": "video"}, "media"),
        ({"url": data_url(b"a"), "uuid": "a b"}, "media.uuid"),
        ({"url": data_url(b"a"), "uuid": "a" * 513}, "media.uuid"),
        ({"url": data_url(b"a"), "ttl_s": 0}, "ttl_s"),
        ({"url": data_url(b"a"), "ttl_s": "1"}, "ttl_s"),
        ({"url": data_url(b"a"), "ttl_s": 1 << 40}, "ttl_s"),
        ({"url": data_url(b"a"), "cache_salt": "a/b"}, "cache_salt"),
        ({"url": data_url(b"a"), "ttl": 5}, "ttl"),
        ({"url": data_url(b"a"), "min_pixels": 9, "max_pixels": 8}, "min_pixels"),
    ],
)
async def test_a_malformed_put_names_the_field(
    gateway: Gateway, alice: MediaApi, body: dict[str, object] | bytes, param: str | None
) -> None:
    reply = await alice.post("/v1/media", body)

    assert (reply.status, reply.error["param"]) == (400, param)
    assert gateway.encoder.headers == []


async def test_an_unknown_model_is_not_found(alice: MediaApi) -> None:
    reply = await alice.put(b"cat", model="other")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?limit=x", "limit"),
        ("?after=x", "after"),
        ("?cache_salt=a%2Fb", "cache_salt"),
    ],
)
async def test_a_malformed_listing_names_the_field(alice: MediaApi, query: str, param: str) -> None:
    reply = await alice.list(query)
    assert (reply.status, reply.error["param"]) == (400, param)


async def test_a_malformed_name_is_refused(alice: MediaApi) -> None:
    for uuid, query in (("a b", ""), ("ü", ""), ("a" * 513, ""), ("a", "?modality=smell")):
        assert (await alice.get(uuid, query)).status == 400
    assert (await alice.list("/%FF")).status == 400  # no UTF-8
