"""Incremental detokenising: the pieces joined are the whole, and no piece splits a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.gateway.detokenizer import WindowDetokenizer
from chiasm.gateway.tokenizer import Tokenizer
from tests.fakes.tokenizers import (
    BYTE_FALLBACK_VOCABULARY,
    make_byte_fallback_tokenizer,
    make_tokenizer,
)

if TYPE_CHECKING:
    from chiasm.gateway.detokenizer import Detokenizer

TOKENIZER = Tokenizer(make_tokenizer())


def byte_ids() -> dict[int, int]:
    """Return the token of each single byte, read off the tokenizer of GPT-2's alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    chars |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocabulary = make_tokenizer().get_vocab()
    return {byte: vocabulary[char] for byte, char in chars.items()}


FALLBACK = Tokenizer(make_byte_fallback_tokenizer())
BYTE_IDS = byte_ids()


def split(token_ids: list[int], cuts: list[int]) -> list[list[int]]:
    """Cut ``token_ids`` into steps of the lengths in ``cuts``, the rest one by one."""
    steps, start = [], 0
    for length in cuts:
        steps.append(token_ids[start : start + length])
        start += length
    return steps + [[token_id] for token_id in token_ids[start:]]


def run(detokenizer: Detokenizer, steps: list[list[int]]) -> list[str]:
    return [*(detokenizer.feed(step) for step in steps), detokenizer.flush()]


@given(st.text(), st.lists(st.integers(0, 5), max_size=8))
def test_any_split_of_any_text_gives_the_text_back(text: str, cuts: list[int]) -> None:
    token_ids = TOKENIZER.encode(text)
    pieces = run(TOKENIZER.detokenizer(), split(token_ids, cuts))
    assert "".join(pieces) == TOKENIZER.decode(token_ids)


@given(st.binary(max_size=40))
def test_bytes_that_are_not_text_come_out_as_in_the_whole_decode(data: bytes) -> None:
    token_ids = [BYTE_IDS[byte] for byte in data]
    pieces = run(TOKENIZER.detokenizer(), [[token_id] for token_id in token_ids])
    assert "".join(pieces) == TOKENIZER.decode(token_ids)


@given(st.lists(st.sampled_from(["the cat", " sat", "é", "中文", "🙂", "cat"]), max_size=12))
def test_the_window_detokenizer_gives_the_text_of_byte_fallback_tokens(words: list[str]) -> None:
    token_ids: list[int] = []
    for word in words:
        known = BYTE_FALLBACK_VOCABULARY.get(word.replace(" ", "▁"))
        token_ids += [known] if known is not None else list(word.encode())
    pieces = run(FALLBACK.detokenizer(), [[token_id] for token_id in token_ids])
    assert "".join(pieces) == FALLBACK.decode(token_ids)


def test_an_unfinished_character_is_held_back() -> None:
    first, *rest = TOKENIZER.encode("🙂")
    detokenizer = TOKENIZER.detokenizer()
    assert detokenizer.feed([first]) == ""
    assert detokenizer.feed(rest) == "🙂"


def test_an_answer_cut_inside_a_character_ends_with_a_replacement() -> None:
    detokenizer = TOKENIZER.detokenizer()
    assert detokenizer.feed(TOKENIZER.encode("🙂")[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("tokenizer", [TOKENIZER, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_special_tokens_leave_no_text(tokenizer: Tokenizer) -> None:
    special = "<|im_end|>" if tokenizer is TOKENIZER else "<s>"
    ids = tokenizer.encode(special)
    assert run(tokenizer.detokenizer(), [ids, ids]) == ["", "", ""]


def test_special_tokens_between_words_do_not_eat_the_space() -> None:
    the, sat, special = (BYTE_FALLBACK_VOCABULARY[name] for name in ("▁the", "▁sat", "<s>"))
    pieces = run(FALLBACK.detokenizer(), [[the], [special], [sat]])
    assert "".join(pieces) == FALLBACK.decode([the, special, sat]) == "the sat"


def test_the_window_stays_short_whatever_the_length_of_the_answer() -> None:
    lengths: list[int] = []

    def decode(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return "x" * len(token_ids)

    detokenizer = WindowDetokenizer(decode)
    for token_id in range(500):
        detokenizer.feed([token_id])
    assert max(lengths) <= 2


def test_endless_broken_bytes_are_emitted_in_the_end() -> None:
    detokenizer = WindowDetokenizer(lambda token_ids: "\ufffd" * len(token_ids))
    text = "".join(detokenizer.feed([token_id]) for token_id in range(200))
    assert len(text) >= 128
