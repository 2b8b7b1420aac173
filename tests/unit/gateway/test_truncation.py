"""How a prompt is cut, and what must not be cut."""

from __future__ import annotations

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import MediaLayout, Modality, ProcessingOptions, TokenRun
from chiasm.common.sampling import SamplingWishes
from chiasm.gateway.chat_request import (
    ChatMessage,
    ChatRequest,
    ChatRole,
    MediaItem,
    TextPart,
    Truncation,
)
from chiasm.gateway.media_spans import ExpandedPrompt
from chiasm.gateway.truncation import check_truncation, truncate

MAX_MODEL_LEN = 16
LAYOUT = MediaLayout((TokenRun(7, 3, is_embedding=True),))
# Two items of three tokens each, at 2 and at 6.
PROMPT = ExpandedPrompt([0, 1, 7, 7, 7, 5, 7, 7, 7, 9, 10], (2, 6), 6)


def request_of(truncation: Truncation | None, max_tokens: int | None = None) -> ChatRequest:
    items = [
        MediaItem(Modality.IMAGE, index, f"messages[0].content[{index}]", "", options, None)
        for index, options in enumerate([ProcessingOptions()] * 2)
    ]
    message = ChatMessage(ChatRole.USER, (*items, TextPart("x")))
    return ChatRequest(
        "request", "", (message,), SamplingWishes(max_tokens=max_tokens), truncation=truncation
    )


def cut(truncation: Truncation | None, max_tokens: int | None = None) -> ExpandedPrompt:
    return truncate(PROMPT, [LAYOUT] * 2, request_of(truncation, max_tokens), MAX_MODEL_LEN)


@pytest.mark.parametrize("truncation", [None, Truncation(11), Truncation(12), Truncation(None)])
def test_prompt_that_is_short_enough_is_left_alone(truncation: Truncation | None) -> None:
    assert cut(truncation) == PROMPT


def test_beginning_is_cut_away_and_media_move_along() -> None:
    assert cut(Truncation(9)) == ExpandedPrompt(PROMPT.token_ids[2:], (0, 4), 6)


def test_end_is_cut_away_if_asked_for() -> None:
    assert cut(Truncation(9, keeps_start=True)) == ExpandedPrompt(PROMPT.token_ids[:9], (2, 6), 6)


@pytest.mark.parametrize(
    ("most", "keeps_start", "index"), [(8, False, 0), (5, False, 0), (8, True, 1), (3, True, 0)]
)
def test_media_item_that_would_lose_tokens_is_named(
    most: int, keeps_start: bool, index: int
) -> None:
    with pytest.raises(InvalidRequestError, match=f"cut to {most} would lose") as caught:
        cut(Truncation(most, keeps_start))

    assert caught.value.param == f"messages[0].content[{index}]"


@pytest.mark.parametrize(("max_tokens", "length"), [(5, 11), (6, 10), (7, 9)])
def test_what_fits_is_what_the_output_leaves(max_tokens: int, length: int) -> None:
    assert len(cut(Truncation(None), max_tokens).token_ids) == length


def test_output_of_a_whole_context_still_leaves_a_token() -> None:
    prompt = ExpandedPrompt([1, 2, 3], (), 0)
    request = ChatRequest(
        "request",
        "",
        (ChatMessage(ChatRole.USER, (TextPart("x"),)),),
        SamplingWishes(max_tokens=MAX_MODEL_LEN),
        truncation=Truncation(None),
    )

    assert truncate(prompt, [], request, MAX_MODEL_LEN).token_ids == [3]


def test_truncation_is_at_most_the_context() -> None:
    check_truncation(Truncation(MAX_MODEL_LEN), MAX_MODEL_LEN)
    check_truncation(Truncation(None), MAX_MODEL_LEN)
    check_truncation(None, MAX_MODEL_LEN)

    with pytest.raises(InvalidRequestError, match=r"\(17\) is greater than max_model_len \(16\)"):
        check_truncation(Truncation(MAX_MODEL_LEN + 1), MAX_MODEL_LEN)
