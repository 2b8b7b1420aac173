"""What clients see of a Redis that fails: nothing (faults F8 to F14 and F36).

A real stack whose generator keeps no embeddings of its own, so that each request reads the store.
Every test prints its fault, its figure and the bar.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.fakes.checkpoints import make_qwen2_vl
from tests.harness import chat
from tests.harness.faulty_stack import (
    FaultyStack,
    body_of,
    dead,
    evict_before_it_is_read,
    full,
    hung,
    wait_until_stored,
)
from tests.harness.second_gateway import second_gateway
from tests.harness.second_generator import second_generator
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def report(fault: str, figure: str, bar: str) -> None:
    print(f"{fault} {figure} {bar} pass")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyStack]:
    model = make_qwen2_vl(tmp_path_factory.mktemp("model"))
    stack = Stack(model, ["--dtype", "float32", "--embedding-cache-bytes", "0"])
    running = FaultyStack(stack)
    yield running
    running.redis.close()
    assert stack.stop() == 0


def test_f8_a_dead_redis_costs_no_answer(faulty: FaultyStack) -> None:
    pictures = [faulty.picture() for _ in range(6)]
    before, inline = faulty.count("chiasm_store_bypasses_total"), faulty.loads("inline")

    with dead(faulty):
        wrong = faulty.ask_all(pictures)
        refusal = chat.refused_chat(faulty.stack.base_url, body_of(None, "a-name-alone"))

    assert wrong == 0
    assert faulty.count("chiasm_store_bypasses_total") > before
    assert faulty.loads("inline") == inline + len(pictures)
    assert (refusal.status, refusal.error["code"]) == (503, "store_unavailable")
    wait_until_stored(faulty)
    report("F8", "errors 0 of 6", "errors 0")


@pytest.mark.parametrize("how", ["pause", "stop"])
def test_f9_a_hung_redis_costs_no_answer(faulty: FaultyStack, how: str) -> None:
    pictures = [faulty.picture() for _ in range(8)]
    skipped = faulty.count("chiasm_store_bypasses_total", 'why="breaker"')

    with hung(faulty, how):
        wrong = faulty.ask_all(pictures[:4]) + faulty.ask_all(pictures[4:])
        # Calls that came after the first ones had stalled did not wait for it.
        skips = faulty.count("chiasm_store_bypasses_total", 'why="breaker"') - skipped

    assert wrong == 0
    assert skips > 0
    wait_until_stored(faulty)
    report("F9", f"errors 0 of 8, calls not tried {skips}", "errors 0, breaker opens")


def test_f10_a_full_redis_costs_no_answer(faulty: FaultyStack) -> None:
    known = faulty.picture()
    assert faulty.ask(known[0]) == (known[1], "miss")
    pictures = [faulty.picture() for _ in range(4)]

    with full(faulty):
        wrong = faulty.ask_all(pictures)
        answer, cache = faulty.ask(known[0])

    assert wrong == 0
    assert (answer, cache) == (known[1], "hit")
    wait_until_stored(faulty)
    report("F10", "errors 0 of 4", "errors 0")


def test_f11_what_is_evicted_between_lookup_and_use_is_encoded_once_more(
    faulty: FaultyStack,
) -> None:
    picture, gold = faulty.picture()
    faulty.redis.flushall()
    faulty.ask(picture, "evicted")
    encoded, inline = faulty.num_encoded(), faulty.loads("inline")

    answer, _ = evict_before_it_is_read(faulty, lambda: faulty.ask(picture, "evicted"))

    assert answer == gold
    assert (faulty.num_encoded(), faulty.loads("inline")) == (encoded + 1, inline + 1)
    report("F11", "errors 0, encodes 1", "errors 0, one encode")


def test_f11_a_name_alone_whose_embedding_is_evicted_is_told_as_not_found(
    faulty: FaultyStack,
) -> None:
    picture, gold = faulty.picture()
    faulty.redis.flushall()
    faulty.ask(picture, "evicted-alone")

    refusal = evict_before_it_is_read(
        faulty, lambda: chat.refused_chat(faulty.stack.base_url, body_of(None, "evicted-alone"))
    )

    assert (refusal.status, refusal.error["code"]) == (400, "media_not_found")
    assert faulty.ask(picture, "evicted-alone")[0] == gold
    assert faulty.ask(None, "evicted-alone") == (gold, "hit")
    report("F11", "media_not_found, then a hit again", "media_not_found")


def test_f12_a_failover_costs_no_answer(faulty: FaultyStack) -> None:
    known = faulty.picture()
    faulty.ask(known[0])
    pictures = [faulty.picture() for _ in range(4)]

    refused = faulty.count("chiasm_store_bypasses_total", 'why="refused"')

    # A replica of nobody: it answers reads and refuses writes.
    faulty.redis.slaveof("127.0.0.1", 1)
    wrong = faulty.ask_all(pictures)
    answer, _ = faulty.ask(known[0])
    refusals = faulty.count("chiasm_store_bypasses_total", 'why="refused"') - refused
    faulty.redis.slaveof()
    seconds = wait_until_stored(faulty)

    assert wrong == 0
    assert answer == known[1]
    assert refusals > 0
    report("F12", f"errors 0 of 5, stored again after {seconds:.1f} s", "errors 0, window < 3 s")


def test_f13_a_redis_that_restarts_empty_is_filled_by_one_encode_of_each(
    faulty: FaultyStack,
) -> None:
    pictures = [faulty.picture() for _ in range(2)]
    assert faulty.ask_all(pictures) == 0
    encoded = faulty.num_encoded()

    with dead(faulty):
        pass
    assert not faulty.keys(chunks=False)
    wrong = faulty.ask_all(pictures * 6)

    assert wrong == 0
    assert faulty.num_encoded() == encoded + len(pictures)
    assert [faulty.ask(picture) for picture, _ in pictures] == [
        (gold, "hit") for _, gold in pictures
    ]
    report("F13", "encodes 1 per item of 6 requests each", "encodes 1")


def change(faulty: FaultyStack, how: str, old: dict[bytes, bytes]) -> None:
    """Corrupt what Redis has of the only item."""
    chunk, manifest = faulty.keys(chunks=True)[0], faulty.keys(chunks=False)[0]
    value, envelope = faulty.redis.get(chunk), faulty.redis.get(manifest)
    assert isinstance(value, bytes)
    assert isinstance(envelope, bytes)
    match how:
        case "chunk":
            faulty.redis.setrange(chunk, 100, b"\xff\x00\xff")
        case "chunk gone":
            faulty.redis.delete(chunk)
        case "chunk cut":
            faulty.redis.set(chunk, value[:-4])
        case "manifest":
            faulty.redis.setrange(manifest, len(envelope) // 2, b"\xff\x00\xff")
        case "manifest cut":
            faulty.redis.set(manifest, envelope[:-1])
        case "chunk of another":
            faulty.redis.set(chunk, next(v for k, v in old.items() if len(v) == len(value)))
        case "manifest of another":
            faulty.redis.set(manifest, next(v for k, v in old.items() if k.endswith(b":m")))


@pytest.mark.parametrize(
    "how",
    [
        "chunk",
        "chunk gone",
        "chunk cut",
        "manifest",
        "manifest cut",
        "chunk of another",
        "manifest of another",
    ],
)
def test_f14_corrupt_entries_are_found_out_and_encoded_anew(faulty: FaultyStack, how: str) -> None:
    faulty.redis.flushall()
    (other, _), (picture, gold) = faulty.picture(), faulty.picture()
    faulty.redis.flushall()
    faulty.ask(other)
    old = {name: faulty.redis.get(name) for name in faulty.redis.scan_iter("chiasm:*")}
    faulty.redis.flushall()
    faulty.ask(picture)
    encoded, found = faulty.num_encoded(), faulty.count("chiasm_store_bad_entries_total")

    change(faulty, how, {k: v for k, v in old.items() if isinstance(v, bytes)})
    answer, _ = faulty.ask(picture)

    assert answer == gold
    assert faulty.count("chiasm_store_bad_entries_total") > found
    assert faulty.num_encoded() == encoded + 1
    assert faulty.ask(picture) == (gold, "hit")
    report("F14", f"{how}: found, wrong outputs 0", "wrong outputs 0, detected all")


def test_f14_two_entries_that_changed_places_are_encoded_anew(faulty: FaultyStack) -> None:
    pictures = [faulty.picture() for _ in range(2)]
    faulty.redis.flushall()
    assert faulty.ask_all(pictures) == 0
    encoded, found = faulty.num_encoded(), faulty.count("chiasm_store_bad_entries_total")

    for chunks in (True, False):
        one, other = faulty.keys(chunks=chunks)
        for old, new in ((one, b"aside"), (other, one), (b"aside", other)):
            faulty.redis.rename(old, new)
    wrong = faulty.ask_all(pictures)

    assert wrong == 0
    assert faulty.count("chiasm_store_bad_entries_total") == found + 2
    assert faulty.num_encoded() == encoded + 2
    report("F14", "swapped: 2 of 2 found, wrong outputs 0", "wrong outputs 0, detected all")


def test_f14_an_old_manifest_that_comes_back_is_encoded_anew(faulty: FaultyStack) -> None:
    picture, gold = faulty.picture()
    faulty.redis.flushall()
    faulty.ask(picture)
    (manifest,) = faulty.keys(chunks=False)
    old = faulty.redis.get(manifest)
    assert isinstance(old, bytes)
    faulty.redis.flushall()
    faulty.ask(picture)
    encoded, found = faulty.num_encoded(), faulty.count("chiasm_store_bad_entries_total")

    faulty.redis.set(manifest, old)
    answer, _ = faulty.ask(picture)

    assert answer == gold
    assert faulty.count("chiasm_store_bad_entries_total") == found + 1
    assert faulty.num_encoded() == encoded + 1
    report("F14", "replayed: found, wrong outputs 0", "wrong outputs 0, detected all")


@pytest.mark.parametrize("how", ["name", "name of another"])
def test_f14_a_corrupt_name_stands_for_nothing_until_it_is_given_anew(
    faulty: FaultyStack, how: str
) -> None:
    (other, _), (picture, gold) = faulty.picture(), faulty.picture()
    faulty.redis.flushall()
    faulty.ask(picture, "corrupt")
    (name,) = faulty.redis.scan_iter("chiasm:*:a:*")
    faulty.ask(other, "sound")
    (sound,) = set(faulty.redis.scan_iter("chiasm:*:a:*")) - {name}
    encoded, found = faulty.num_encoded(), faulty.count("chiasm_store_bad_entries_total", "alias_")

    if how == "name":
        faulty.redis.setrange(name, 20, b"\xff\x00\xff")
    else:
        faulty.redis.copy(sound, name, replace=True)
    refusal = chat.refused_chat(faulty.stack.base_url, body_of(None, "corrupt"))

    assert refusal.error["code"] == "media_not_found"
    assert faulty.count("chiasm_store_bad_entries_total", "alias_") == found + 1
    assert not faulty.redis.exists(name)
    assert faulty.ask(picture, "corrupt") == (gold, "hit")
    assert faulty.ask(None, "corrupt") == (gold, "hit")
    assert faulty.num_encoded() == encoded
    report("F14", f"{how}: found, wrong outputs 0", "wrong outputs 0, detected all")


def test_f14_an_old_name_that_comes_back_never_answers_for_other_data(faulty: FaultyStack) -> None:
    (old, old_gold), (new, gold) = faulty.picture(), faulty.picture()
    faulty.redis.flushall()
    faulty.ask(old, "renamed")
    (name,) = faulty.redis.scan_iter("chiasm:*:a:*")
    envelope = faulty.redis.get(name)
    assert isinstance(envelope, bytes)
    faulty.redis.delete(name)
    assert faulty.ask(new, "renamed")[0] == gold

    faulty.redis.set(name, envelope)
    refusal = chat.refused_chat(faulty.stack.base_url, body_of(new, "renamed"))

    assert refusal.status == 409
    # The data alone tell an old name from a new one: without them it stands for what it stood for.
    assert faulty.ask(None, "renamed") == (old_gold, "hit")
    assert faulty.ask(new) == (gold, "hit")
    report("F14", "old name: refused with data, wrong outputs 0", "wrong outputs 0")


def put(faulty: FaultyStack, picture: bytes, uuid: str) -> int:
    body = {"url": "data:image/png;base64," + base64.b64encode(picture).decode(), "uuid": uuid}
    request = urllib.request.Request(
        f"{faulty.stack.base_url}/v1/media",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60.0) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_f36_a_hundred_uploads_of_one_name_encode_once(faulty: FaultyStack) -> None:
    picture, gold = faulty.picture()
    encoded = faulty.num_encoded()

    with ThreadPoolExecutor(25) as pool:
        statuses = list(pool.map(lambda _: put(faulty, picture, "hundred"), range(100)))

    assert statuses == [200] * 100
    assert faulty.num_encoded() == encoded + 1
    assert faulty.ask(None, "hundred") == (gold, "hit")
    report("F36", "100 uploads, encodes 1", "encodes 1")


def test_f36_one_of_many_contents_wins_a_name(faulty: FaultyStack) -> None:
    pictures = [faulty.picture() for _ in range(10)]
    uploads = pictures * 10

    with ThreadPoolExecutor(25) as pool:
        statuses = list(pool.map(lambda one: put(faulty, one[0], "contested"), uploads))

    assert set(statuses) == {200, 409}
    winners = {one for one, status in zip(uploads, statuses, strict=True) if status == 200}
    (winner,) = winners
    assert statuses.count(200) == uploads.count(winner)
    assert faulty.ask(None, "contested") == (winner[1], "hit")
    figure = f"contents that won 1 of 10, refused {statuses.count(409)} of 100"
    report("F36", figure, "one winner, rest 409")


def test_a_name_is_hit_elsewhere_and_after_a_restart_of_everything_but_redis(
    faulty: FaultyStack,
) -> None:
    picture, gold = faulty.picture()
    assert faulty.ask(picture, "lasting") == (gold, "miss")
    encoded = faulty.num_encoded()

    with second_generator(faulty.stack) as generator:
        own = faulty.stack.address("generator")
        answers = []
        for generators in (own, generator):
            with second_gateway(faulty.stack, ["--generators", generators]) as url:
                answers.append(chat.post_chat(url, body_of(None, "lasting")))
    assert faulty.num_encoded() == encoded
    faulty.restart_all_but_redis()

    for answer in answers:
        assert answer["usage"]["media"][0]["cache"] == "hit"
        assert answer["choices"][0]["message"]["content"] == gold
    assert faulty.ask(None, "lasting") == (gold, "hit")
    # Of the process that was started after the name was given.
    assert faulty.num_encoded() == 0
    report("uuid", "hits 3 of 3, encodes 0", "hits, encodes 0")
