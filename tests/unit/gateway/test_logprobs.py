"""Log probabilities over REST: the bytes of the tokens, joined, spell the answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.gateway.chat_events import AnswerHead, ChatDelta, TokenLogprobs, Usage
from chiasm.gateway.rest.logprobs import logprobs_to_json, prompt_logprobs_to_json
from chiasm.gateway.rest.sse import ChunkWriter, stream_chunks
from chiasm.gateway.tokenizer import Tokenizer
from tests.fakes.tokenizers import (
    BYTE_FALLBACK_VOCABULARY,
    make_byte_fallback_tokenizer,
    make_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

TEXT = "é😀"
BYTE_LEVEL = Tokenizer(make_tokenizer())
BYTE_FALLBACK = Tokenizer(make_byte_fallback_tokenizer())
WORDS = ("▁", "▁the", "cat", "▁sat", "<0x20>", "<0x0A>")
PIECES = [list(TEXT.encode()), *([BYTE_FALLBACK_VOCABULARY[word]] for word in WORDS)]


def _logprobs(token_ids: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(one, -1.0, 1, (one,), (-1.0,)) for one in token_ids)


@pytest.mark.parametrize(
    ("tokenizer", "token_ids"),
    [(BYTE_LEVEL, BYTE_LEVEL.encode(TEXT)), (BYTE_FALLBACK, list(TEXT.encode()))],
    ids=["byte-level", "byte-fallback"],
)
def test_bytes_of_a_character_that_tokens_split_join_to_it(
    tokenizer: Tokenizer, token_ids: list[int]
) -> None:
    content = json.loads(logprobs_to_json(_logprobs(token_ids), tokenizer.bytes_of))["content"]

    assert len(content) == len(TEXT.encode())
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == TEXT
    assert [entry["top_logprobs"][0]["bytes"] for entry in content] == [
        entry["bytes"] for entry in content
    ]
    assert {entry["token"] for entry in content} == {"\ufffd"}


def test_prompt_s_tokens_that_are_a_part_of_a_character_are_told_as_replacements() -> None:
    logprobs = _logprobs(BYTE_LEVEL.encode("é"))

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


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8))
def test_tokens_of_a_decoder_that_drops_the_first_space_spell_the_answer(
    pieces: list[list[int]],
) -> None:
    token_ids = [token_id for piece in pieces for token_id in piece]

    content = json.loads(logprobs_to_json(_logprobs(token_ids), BYTE_FALLBACK.bytes_of))["content"]

    for entries in (content, [entry["top_logprobs"][0] for entry in content]):
        data = bytes(byte for entry in entries for byte in entry["bytes"])
        assert data.decode() == BYTE_FALLBACK.decode(token_ids)


async def test_only_the_first_token_of_a_streamed_answer_loses_its_space() -> None:
    the, sat = (BYTE_FALLBACK_VOCABULARY[one] for one in ("▁the", "▁sat"))
    deltas = [
        ChatDelta("", (), Usage(), logprobs=_logprobs(token_ids), index=index)
        for index, token_ids in ((0, (the, sat)), (1, (sat,)), (0, (the,)), (1, (the, sat)))
    ]
    writer = ChunkWriter(
        AnswerHead("r", "m", 0),
        BYTE_FALLBACK.bytes_of,
        tells_media=False,
        includes_usage=False,
        has_continuous_usage=False,
    )

    async def rest() -> AsyncIterator[ChatDelta]:
        for delta in deltas[1:]:
            yield delta

    texts = {0: "", 1: ""}
    async for event in stream_chunks(deltas[0], rest(), writer, includes_usage=False):
        if b'content":[' in event:
            (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
            tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
            texts[choice["index"]] += "".join(tokens)

    assert texts == {0: "the sat the", 1: "sat the sat"}


def test_tokens_of_a_prompt_keep_their_spaces() -> None:
    logprobs = _logprobs([BYTE_FALLBACK_VOCABULARY["▁the"], BYTE_FALLBACK_VOCABULARY["▁"]])

    _, *entries = json.loads(prompt_logprobs_to_json(logprobs, BYTE_FALLBACK.bytes_of))

    texts = [one["decoded_token"] for entry in entries for one in entry.values()]
    assert texts == [" the", " "]
