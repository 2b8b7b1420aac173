"""Spellings of special tokens in a text are text: no medium is bound to them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

from tests.harness import chat
from tests.harness.attack import ANSWERED, ENTRIES, Part, attack, file, text

if TYPE_CHECKING:
    from tests.harness.attack_target import AttackTarget

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PICTURES = [file(chat.picture(80 + seed, 64, 64)) for seed in range(2)]
PLAIN = "x"
MANY, FAR_TOO_MANY = 20, 100_000


def special_tokens(target: AttackTarget) -> list[str]:
    document = json.loads(target.tokenizer_file.read_text())
    return [token["content"] for token in document["added_tokens"] if token["special"]]


def plain_tokenizer(target: AttackTarget) -> Tokenizer:
    """Return the tokenizer without its special tokens: it can only spell them."""
    document = json.loads(target.tokenizer_file.read_text())
    return Tokenizer.from_str(json.dumps({**document, "added_tokens": []}))


def parts_of(content: str, num_pictures: int) -> list[Part]:
    return [*PICTURES[:num_pictures], text(content)]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("num_pictures", [0, 1, 2])
@pytest.mark.parametrize("times", [1, MANY])
def test_spellings_take_the_tokens_of_their_characters(
    target: AttackTarget, entry: str, num_pictures: int, times: int
) -> None:
    tokenizer = plain_tokenizer(target)
    plain = target.send(entry, parts_of(PLAIN, num_pictures))
    num_around = plain.prompt_tokens - len(tokenizer.encode(PLAIN).ids)
    tokens = special_tokens(target)
    assert len(tokens) >= 10

    for token in tokens:
        spelling = token * times
        row = attack(f"{token} {times} times", parts_of(spelling, num_pictures), ANSWERED)
        reply = target.check_attack(row, entry)

        assert reply.prompt_tokens == num_around + len(tokenizer.encode(spelling).ids)
        assert reply.media_tokens == plain.media_tokens


@pytest.mark.parametrize("entry", ENTRIES)
def test_all_spellings_at_once_leave_pictures_in_their_places(
    target: AttackTarget, entry: str
) -> None:
    spellings = "".join(special_tokens(target))
    around = [text(spellings), PICTURES[0], text(spellings), PICTURES[1], text(spellings)]

    reply = target.check_attack(
        attack("all special tokens between pictures", around, ANSWERED), entry
    )

    plain = target.send(entry, [text(PLAIN), PICTURES[0], text(PLAIN), PICTURES[1], text(PLAIN)])
    length = len(plain_tokenizer(target).encode(spellings).ids)
    assert reply.media_tokens == plain.media_tokens
    assert reply.prompt_tokens == plain.prompt_tokens + 3 * (length - 1)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_a_hundred_thousand_spellings_are_too_long(
    target: AttackTarget, entry: str, num_pictures: int
) -> None:
    content = "<|IMAGE|>" * FAR_TOO_MANY
    row = attack("100000 placeholders", parts_of(content, num_pictures), "prompt_too_long")

    assert target.check_attack(row, entry).status == 400
