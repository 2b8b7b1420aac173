"""The Redis user and the encryption that ``docs/operations.md`` describes are what it takes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest

from chiasm.common.alias_target import AliasTarget
from chiasm.common.errors import StoreUnavailableError
from chiasm.common.identity import AliasName
from chiasm.common.lease import LeaseSettings
from chiasm.common.media import Modality
from chiasm.common.secrets import StoreSecrets
from chiasm.common.tenant_scan import ScanCursor
from tests.fakes.certificates import Certificate
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store
from tests.fakes.tls_relay import tls_relay

if TYPE_CHECKING:
    from chiasm.common.embedding_store import EmbeddingStore
    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
_USER = "chiasm"
_PASSWORD = "p@ss/word"
_QUOTED_PASSWORD = "p%40ss%2Fword"
_LEASE = LeaseSettings(duration_s=2.0, heartbeat_s=0.05, check_s=5.0, patience_s=20.0)
_ALIAS = AliasName(Modality.IMAGE, "", "cat")
_SHARE = 16 << 20
_LARGE = make_ref(num_rows=1100, width=1024)  # three chunks


def _rules() -> list[str]:
    """Return the rules of the user on the page, with a password for its placeholder."""
    found = re.search(rf"^user {_USER} (.+)$", _PAGE.read_text(), re.MULTILINE)
    assert found, "the page describes the user"
    return found[1].replace("PASSWORD", _PASSWORD).split()


def _commands() -> list[str]:
    return [rule[1:] for rule in _rules() if rule.startswith("+")]


def _url(server: RedisServer) -> str:
    return f"{server.url}?username={_USER}&password={_QUOTED_PASSWORD}"


async def _set_user(server: RedisServer, rules: list[str]) -> None:
    await server.command("ACL", "SETUSER", _USER, "reset", *rules)
    await server.command("ACL", "LOG", "RESET")


async def _denied(server: RedisServer) -> list[str]:
    """Return what the user was denied."""
    entries = await server.admin.acl_log()
    return [str(entry["object"]) for entry in entries]


async def _use_everything(store: EmbeddingStore) -> None:
    """Do all that the services do with the store; fail if any of it has no effect."""
    assert await store.ping()
    await store.put("a", make_embedding(_LARGE), make_layout(_LARGE))
    assert await store.lookup("a", _LARGE.embedding_id) is not None
    assert await store.seconds_left("a", [_LARGE.embedding_id]) > [0]
    loaded = await store.get("a", _LARGE)
    assert loaded is not None
    assert loaded.buffers[0] == make_embedding(_LARGE).buffers[0]
    assert await store.delete("a", _LARGE.embedding_id)
    assert await store.get("a", _LARGE) is None

    first, second = AliasTarget(bytes(32)), AliasTarget(bytes(32), bytes(32))
    assert await store.aliases.bind("a", _ALIAS, first) == first
    assert await store.aliases.bind("a", _ALIAS, second) == second
    assert await store.aliases.read("a", _ALIAS) == second
    page = await store.tenants.alias_hashes("a", ScanCursor(), max_hashes=9)
    assert len(page.hashes) == 1
    assert await store.aliases.delete("a", _ALIAS)
    await _hand_over_lease(store)


async def _hand_over_lease(store: EmbeddingStore) -> None:
    async def find_nothing() -> None:
        return None

    holder, waiter = (store.lease("a", bytes(32), _LEASE) for _ in range(2))
    await holder.acquire_unless(find_nothing)
    async with holder.hold():
        waiting = asyncio.create_task(waiter.acquire_unless(find_nothing))
        await asyncio.wait([waiting], timeout=3 * _LEASE.heartbeat_s)
        assert not waiting.done()
    # Far sooner than the lease would run out or the waiter look again: it was woken.
    await asyncio.wait_for(waiting, _LEASE.duration_s / 2)
    async with waiter.hold():
        pass
    # As the heartbeat of a holder that has lost its lease does.
    assert not await store._redis.execute_if("chiasm:lost", b"owner", ("PEXPIRE", "chiasm:lost", 1))


async def test_user_of_the_page_may_do_all_that_the_services_do(redis_server: RedisServer) -> None:
    await _set_user(redis_server, _rules())
    store = patient_store(_url(redis_server), StoreSecrets.generate(), tenant_bytes=_SHARE)

    await _use_everything(store)

    assert await _denied(redis_server) == []
    await store.close()


@pytest.mark.parametrize("command", _commands())
async def test_user_of_the_page_may_do_nothing_that_the_services_do_not(
    redis_server: RedisServer, command: str
) -> None:
    await _set_user(redis_server, [*_rules(), f"-{command}"])
    store = patient_store(_url(redis_server), StoreSecrets.generate(), tenant_bytes=_SHARE)
    try:
        await _use_everything(store)
    except (StoreUnavailableError, AssertionError, TimeoutError):
        pass
    finally:
        await store.close()

    assert command.partition("|")[0] in await _denied(redis_server)


@pytest.mark.parametrize(
    "words",
    [("EVAL", "return 1", "0"), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("FLUSHALL",), ("DEBUG",)],
)
async def test_user_of_the_page_may_not_touch_the_server(
    redis_server: RedisServer, words: tuple[str, ...]
) -> None:
    await _set_user(redis_server, _rules())
    store = patient_store(_url(redis_server), StoreSecrets.generate(), tenant_bytes=_SHARE)
    with pytest.raises(StoreUnavailableError):
        await store._redis.execute([words])
    with pytest.raises(StoreUnavailableError):
        await store._redis.execute([("SET", "other:key", b"x")])
    await store.close()


async def test_store_works_over_tls_as_the_page_says(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    found = re.search(r"rediss://\S+\?\S+(?=`)", _PAGE.read_text())
    assert found, "the page describes an encrypted URL"
    certificate = Certificate.make(tmp_path)
    await _set_user(redis_server, _rules())
    path = Path(unquote(urlsplit(redis_server.url).path))
    async with tls_relay(path, certificate.server_context()) as port:
        url = (
            found[0]
            .replace("PASSWORD", _QUOTED_PASSWORD)
            .replace("redis.internal:6379", f"localhost:{port}")
            .replace("/etc/chiasm/redis-ca.pem", str(certificate.certificate))
        )
        store = patient_store(url, StoreSecrets.generate())
        await _use_everything(store)
        await store.close()
        stranger = patient_store(url.partition("?")[0], StoreSecrets.generate())
        assert not await stranger.ping()
        await stranger.close()
