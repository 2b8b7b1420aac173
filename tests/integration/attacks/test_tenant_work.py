"""What one tenant has sent shows another neither by an answer nor by the work that it takes.

Time is not measured but what takes it: the work of a request is the same whether or not another
tenant has sent the same before, and less for a tenant that repeats itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from chiasm.common.embedded_redis import SOCKET_NAME
from tests.harness import chat
from tests.harness.attack import ANSWERED, ENTRIES, REST, file, named, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.harness.attack import Part
    from tests.harness.attack_target import AttackTarget, Reply

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

QUESTION = text("Tell what is in the picture, " + "and then what is not in it, " * 8)
# By what they tell: metric, service, labels.
COUNTERS = {
    "decoded": ("vllm:mm_media_decode_latency_seconds_count", "encoder-0", ""),
    "preprocessed": ("vllm:mm_preprocessing_total_latency_seconds_count", "encoder-0", ""),
    "encoded": ("chiasm_encoder_encoded_items_total", "encoder-0", ""),
    "forwards": ("chiasm_encoder_forward_seconds_count", "encoder-0", ""),
    "queried_tokens": ("vllm:prefix_cache_queries_total", "generator", ""),
    "cached_tokens": ("vllm:prefix_cache_hits_total", "generator", ""),
    "host_hits": ("chiasm_generator_embedding_loads_total", "generator", 'source="host"'),
    "gateway_hits": ("chiasm_gateway_media_items_total", "gateway", 'cache="hit"'),
}
FROM_SCRATCH = {"decoded": 1, "preprocessed": 1, "encoded": 1, "forwards": 1}
NOTHING_KNOWN = {"cached_tokens": 0, "host_hits": 0, "gateway_hits": 0}


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What came of a request: the answer without what is new in each, and the work for it."""

    answer: object
    work: Mapping[str, float]


def observe(
    target: AttackTarget, entry: str, parts: Sequence[Part], tenant: str, salt: str
) -> Seen:
    """Send a message and note what the tenant sees of it, and what the services did for it."""
    before = _read_counters(target)
    reply = target.send(entry, parts, tenant=tenant, salt=salt)
    after = _read_counters(target)
    return Seen(_without_names(entry, reply), {name: after[name] - before[name] for name in after})


def _read_counters(target: AttackTarget) -> dict[str, float]:
    return {name: target.stack.metric(*counter) for name, counter in COUNTERS.items()}


def _without_names(entry: str, reply: Reply) -> object:
    """Return all of a reply but what names the one request, and how long its own work took."""
    if entry != REST or reply.code != ANSWERED:
        return dataclasses.replace(reply, body=re.sub(r"[0-9a-f]{32}", "", reply.body))
    document = json.loads(reply.body)
    del document["id"], document["created"]
    for media in document["usage"]["media"]:
        media.update({name: None for name in media if name.endswith("_ms")})
    return document


def _read_keys(target: AttackTarget) -> set[str]:
    with Redis(unix_socket_path=str(target.stack.state_dir / SOCKET_NAME)) as redis:
        return {key.decode() for key in redis.scan_iter(count=1000)}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_picture_of_another_tenant_or_salt_is_all_work_from_the_start(
    target: AttackTarget, entry: str
) -> None:
    # Text in front too: a block with a picture is known by the picture's id, which none share.
    parts = [QUESTION, file(chat.picture(80 + ENTRIES.index(entry), 90, 60)), QUESTION]
    salt = f"work-{entry}"
    with target.unharmed(f"the work for a picture of another tenant over {entry}"):
        first = observe(target, entry, parts, "alice", salt)
        again = observe(target, entry, parts, "alice", salt)

        foreign = observe(target, entry, parts, "bob", salt)
        salted = observe(target, entry, parts, "alice", f"other-{salt}")

    assert first.work.items() >= {**FROM_SCRATCH, **NOTHING_KNOWN}.items()
    assert foreign == first
    assert salted == first
    # The counters and the answer tell of what is known: to the tenant itself.
    assert again.work.items() >= dict.fromkeys(FROM_SCRATCH, 0).items()
    assert again.work["gateway_hits"] == 1
    assert again.work["cached_tokens"] > again.work["queried_tokens"] // 2
    assert again.answer != first.answer


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_name_of_another_tenant_is_as_unknown_as_one_that_nobody_has(
    target: AttackTarget, entry: str
) -> None:
    picture, other = chat.picture(82, 90, 60), chat.picture(83, 90, 60)
    salt, name = f"name-work-{entry}", f"a-name-over-{entry}"
    with target.unharmed(f"the work for a name of another tenant over {entry}"):
        observe(target, entry, [named(name, picture), QUESTION], "alice", salt)

        taken = observe(target, entry, [named(name), QUESTION], "bob", salt)
        unknown = observe(target, entry, [named("nobodys-name"), QUESTION], "bob", salt)
        bound = observe(target, entry, [named(name, other), QUESTION], "bob", salt)
        fresh = observe(
            target, entry, [named("nobodys-name", other), QUESTION], "bob", f"other-{salt}"
        )

    assert taken == unknown
    assert bound.work == fresh.work
    assert bound.work.items() >= {**FROM_SCRATCH, **NOTHING_KNOWN}.items()
    assert _without_uuid(bound.answer) == _without_uuid(fresh.answer)


def _without_uuid(answer: object) -> str:
    return re.sub(r"a-name-over-\w+|nobodys-name", "", str(answer))


def test_no_key_of_the_store_tells_that_two_tenants_have_the_same(target: AttackTarget) -> None:
    parts = [named("same-name", chat.picture(84, 90, 60)), QUESTION]
    keys = [_read_keys(target)]
    for tenant in ("alice", "bob"):
        target.send(REST, parts, tenant=tenant)
        keys.append(_read_keys(target))

    own = [after - before for before, after in pairwise(keys)]
    names = [{part for key in some for part in key.split(":") if len(part) >= 16} for some in own]

    assert len(own[0]) == len(own[1]) >= 3
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]
