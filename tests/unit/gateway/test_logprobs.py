"""Log probabilities over REST: the bytes of the tokens, joined, spell the answer."""

from __future__ import annotations

import json

import pytest

from chiasm.gateway.chat_events import TokenLogprobs
from chiasm.gateway.rest.logprobs import logprobs_to_json, prompt_logprobs_to_json
from chiasm.gateway.tokenizer import Tokenizer
from tests.fakes.tokenizers import make_byte_fallback_tokenizer, make_tokenizer

TEXT = "é😀"
BYTE_LEVEL = Tokenizer(make_tokenizer())
BYTE_FALLBACK = Tokenizer(make_byte_fallback_tokenizer())


@pytest.mark.parametrize(
    ("tokenizer", "token_ids"),
    [(BYTE_LEVEL, BYTE_LEVEL.encode(TEXT)), (BYTE_FALLBACK, list(TEXT.encode()))],
    ids=["byte-level", "byte-fallback"],
)
def test_bytes_of_a_character_that_tokens_split_join_to_it(
    tokenizer: Tokenizer, token_ids: list[int]
) -> None:
    logprobs = [TokenLogprobs(one, -1.0, 1, (one,), (-1.0,)) for one in token_ids]

    content = json.loads(logprobs_to_json(logprobs, tokenizer.bytes_of))["content"]

    assert len(content) == len(TEXT.encode())
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == TEXT
    assert [entry["top_logprobs"][0]["bytes"] for entry in content] == [
        entry["bytes"] for entry in content
    ]
    assert {entry["token"] for entry in content} == {"\ufffd"}


def test_prompt_s_tokens_that_are_a_part_of_a_character_are_told_as_replacements() -> None:
    logprobs = [TokenLogprobs(one, -1.0, 1, (), ()) for one in BYTE_LEVEL.encode("é")]

    _, *entries = json.loads(prompt_logprobs_to_json(logprobs, BYTE_LEVEL.bytes_of))

    texts = [one["decoded_token"] for entry in entries for one in entry.values()]
    assert texts == ["\ufffd", "\ufffd"]


@pytest.mark.parametrize(
    ("tokenizer", "special"),
    [(BYTE_LEVEL, "<|im_end|>"), (BYTE_FALLBACK, "<s>")],
    ids=["byte-level", "byte-fallback"],
)
def test_a_special_token_s_bytes_are_its_spelling(tokenizer: Tokenizer, special: str) -> None:
    (token_id,) = tokenizer.encode(special)
    assert tokenizer.bytes_of(token_id) == special.encode()
