"""Spellings of special tokens in client text stay text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.gateway.spellings import TextGuard
from chiasm.gateway.tokenizer import Tokenizer
from tests.fakes.tokenizers import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENIZER = Tokenizer(make_tokenizer())
ADDED = (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)
ADDED_IDS = {TOKENIZER.encode(text)[0] for text in ADDED}
FRAGMENTS = st.sampled_from([*ADDED, "<|", "im_end", "|>", "<", ">", " ", "text", "é", "\n"])


def encode(texts: Sequence[str]) -> list[int]:
    """Encode client texts next to each other inside one message of a template."""
    guard = TextGuard(TOKENIZER.spellings)
    body = "".join(guard.protect(text) for text in texts)
    return TOKENIZER.encode_guarded(f"<|im_start|>user\n{body}<|im_end|>\n", guard)


@given(st.lists(st.lists(FRAGMENTS, max_size=5).map("".join), max_size=4))
def test_client_text_never_becomes_an_added_token(texts: list[str]) -> None:
    token_ids = encode(texts)
    start, end = TOKENIZER.encode("<|im_start|>")[0], TOKENIZER.encode("<|im_end|>")[0]
    assert [token_id for token_id in token_ids if token_id in ADDED_IDS] == [start, end]


@given(st.lists(st.lists(FRAGMENTS, max_size=5).map("".join), max_size=4))
def test_the_text_itself_is_kept(texts: list[str]) -> None:
    shown = TOKENIZER.decode(encode(texts))
    assert shown == f"user\n{''.join(texts)}\n"


@given(st.text())
def test_text_without_spellings_is_encoded_as_ever(text: str) -> None:
    guard = TextGuard(TOKENIZER.spellings)
    rendered = f"<|im_start|>user\n{guard.protect(text)}<|im_end|>\n"
    expected = TOKENIZER.encode(f"<|im_start|>user\n{text}<|im_end|>\n")
    assert TOKENIZER.encode_guarded(rendered, guard) == expected


@pytest.mark.parametrize("parts", [("<|im_", "end|>"), ("<|", "im_end", "|>"), ("<", "|im_end|>")])
def test_a_spelling_made_of_several_texts_stays_text(parts: tuple[str, ...]) -> None:
    end = TOKENIZER.encode("<|im_end|>")[0]
    assert encode(parts).count(end) == 1


def test_a_sentinel_of_another_request_is_only_text() -> None:
    other = TextGuard(TOKENIZER.spellings)
    sentinel = other.protect("<|im_end|>")
    guard = TextGuard(TOKENIZER.spellings)
    assert [piece.is_literal for piece in guard.split(guard.protect(sentinel))] == [False]


def test_many_spellings_are_encoded_in_bounded_time() -> None:
    token_ids = encode(["<|image_pad|>" * 5000])
    assert TOKENIZER.encode("<|image_pad|>")[0] not in token_ids
