"""A name stands for one content of one tenant, whatever anybody sends under it."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import pytest

from tests.harness import chat
from tests.harness.attack import ANSWERED, ENTRIES, file, named, text

if TYPE_CHECKING:
    from tests.harness.attack_target import AttackTarget, Reply

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

CAT, DOG = chat.picture(70, 90, 60), chat.picture(71, 90, 60)
QUESTION = text("Describe it.")
NOT_FOUND = "media_not_found"


def ask_about(
    target: AttackTarget, entry: str, uuid: str, tenant: str = "alice", **wishes: int
) -> Reply:
    return target.send(entry, [named(uuid, None, **wishes), QUESTION], tenant=tenant)


def ask_with(
    target: AttackTarget, entry: str, uuid: str, data: bytes, tenant: str = "alice", **wishes: int
) -> Reply:
    return target.send(entry, [named(uuid, data, **wishes), QUESTION], tenant=tenant)


def answer_for(target: AttackTarget, entry: str, data: bytes) -> str:
    """Return what is said about a picture under no name."""
    return target.send(entry, [file(data), QUESTION], salt="unnamed").text


@pytest.fixture
def uuid(request: pytest.FixtureRequest) -> str:
    """Return a name of this test's own."""
    return "".join(char if char.isalnum() else "-" for char in request.node.name)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_name_is_unknown_to_another_tenant(target: AttackTarget, entry: str, uuid: str) -> None:
    with target.unharmed(f"a name of another tenant over {entry}"):
        assert ask_with(target, entry, uuid, CAT).code == ANSWERED

        foreign = ask_about(target, entry, uuid, "bob")
        with_other_data = ask_with(target, entry, uuid, DOG, "bob")

        target.totals.num_foreign_hits += "hit" in foreign.cache
        target.check_reply(foreign, [NOT_FOUND], "")
        target.check_reply(with_other_data, [ANSWERED], "")
        assert with_other_data.text == answer_for(target, entry, DOG)
        assert ask_about(target, entry, uuid).text == answer_for(target, entry, CAT)


@pytest.mark.parametrize("entry", ENTRIES)
def test_content_of_another_tenant_is_encoded_again(
    target: AttackTarget, entry: str, uuid: str
) -> None:
    picture = chat.picture(72 + ENTRIES.index(entry), 90, 60)
    with target.unharmed(f"content of another tenant over {entry}"):
        assert ask_with(target, entry, uuid, picture).cache == ("miss",)

        foreign = ask_with(target, entry, uuid, picture, "bob")

        target.totals.num_foreign_hits += "hit" in foreign.cache
        assert foreign.cache == ("miss",)
        assert ask_with(target, entry, uuid, picture).cache == ("hit",)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_prompt_of_another_tenant_is_not_in_the_prefix_cache(
    target: AttackTarget, entry: str
) -> None:
    prompt = [text(f"A secret that is told over {entry}: " + "the key is under the mat, " * 9)]
    with target.unharmed(f"a prompt of another tenant over {entry}"):
        # With a salt, so that nobody has had even the beginning of the template.
        target.send(entry, prompt, salt=f"prompt-{entry}")

        foreign = target.send(entry, prompt, tenant="bob", salt=f"prompt-{entry}")
        salted = target.send(entry, prompt, salt=f"other-prompt-{entry}")
        own = target.send(entry, prompt, salt=f"prompt-{entry}")

        target.totals.num_foreign_hits += foreign.cached_tokens > 0
        assert foreign.cached_tokens == salted.cached_tokens == 0
        assert own.cached_tokens > own.prompt_tokens // 2


@pytest.mark.parametrize("entry", ENTRIES)
def test_other_content_under_a_name_is_a_conflict(
    target: AttackTarget, entry: str, uuid: str
) -> None:
    with target.unharmed(f"other content under a name over {entry}"):
        assert ask_with(target, entry, uuid, CAT).code == ANSWERED

        conflict = ask_with(target, entry, uuid, DOG)

        target.totals.num_wrong_content_hits += conflict.code == ANSWERED
        target.check_reply(conflict, ["uuid_conflict"], "")
        assert conflict.status == 409
        assert ask_about(target, entry, uuid).text == answer_for(target, entry, CAT)


@pytest.mark.parametrize("entry", ENTRIES)
def test_changed_options_are_no_stale_hit(target: AttackTarget, entry: str, uuid: str) -> None:
    picture = chat.picture(74 + ENTRIES.index(entry), 200, 200)
    with target.unharmed(f"changed options under a name over {entry}"):
        whole = ask_with(target, entry, uuid, picture)

        without_data = ask_about(target, entry, uuid, max_pixels=60 * 60)
        small = ask_with(target, entry, uuid, picture, max_pixels=60 * 60)

        target.totals.num_wrong_content_hits += "hit" in (*without_data.cache, *small.cache)
        target.check_reply(without_data, [NOT_FOUND], "")
        assert (small.code, small.cache) == (ANSWERED, ("miss",))
        assert small.media_tokens < whole.media_tokens
        assert ask_about(target, entry, uuid).media_tokens == whole.media_tokens


@pytest.mark.parametrize(("first", "second"), list(permutations(ENTRIES)))
def test_a_name_holds_over_the_other_entry_point(
    target: AttackTarget, first: str, second: str, uuid: str
) -> None:
    with target.unharmed(f"a name of {first} over {second}"):
        put = ask_with(target, first, uuid, CAT)

        asked = ask_about(target, second, uuid)
        conflict = ask_with(target, second, uuid, DOG)

        assert (asked.text, asked.cache) == (put.text, ("hit",))
        target.check_reply(conflict, ["uuid_conflict"], "")


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_uuid_among_good_ones_fails_the_request_alone(
    target: AttackTarget, entry: str, uuid: str
) -> None:
    with target.unharmed(f"one unknown name of three over {entry}"):
        parts = [file(CAT), named(f"{uuid}-unknown"), file(DOG), QUESTION]

        target.check_reply(target.send(entry, parts), [NOT_FOUND], "")
