"""A whole answer is written where it does not hold up others."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from chiasm.gateway.chat_events import (
    AnswerHead,
    ChatDelta,
    Finish,
    TokenLogprobs,
    Usage,
    WholeAnswer,
    WholeChoice,
)
from chiasm.gateway.rest import answers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

MOST = 64


def answer_of(num_scored: int, num_scored_of_prompt: int) -> WholeAnswer:
    scored = TokenLogprobs(1, -1.0, 1, (), ())
    each = num_scored // 2
    choices = [WholeChoice("a", (1,), Finish("stop"), (scored,) * each) for _ in range(2)]
    return WholeAnswer(tuple(choices), Usage(), (scored,) * num_scored_of_prompt)


async def no_deltas() -> AsyncGenerator[ChatDelta, None]:
    """Yield nothing."""
    deltas: tuple[ChatDelta, ...] = ()
    for delta in deltas:
        yield delta


def bytes_of(token_id: int, *, is_first: bool = False) -> bytes:
    """Return the same for every token."""
    return b"x"


@pytest.mark.parametrize(
    ("num_scored", "num_of_prompt", "is_long"),
    [(0, 0, False), (MOST, 0, False), (MOST + 2, 0, True), (2, MOST - 2, False), (2, MOST, True)],
)
async def test_scored_tokens_of_all_answers_and_of_the_prompt_decide_who_writes(
    num_scored: int, num_of_prompt: int, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[threading.Thread] = []

    def write(_source: answers.AnswerSource, _answer: WholeAnswer) -> bytes:
        writers.append(threading.current_thread())
        return b""

    monkeypatch.setattr(answers, "_answer_to_json", write)
    source = answers.AnswerSource(AnswerHead("id", "m", 0), no_deltas(), {}, bytes_of)

    await answers._write(source, answer_of(num_scored, num_of_prompt))

    assert (writers != [threading.main_thread()]) == is_long
