"""The text of an answer: without its stop token, up to its stop string, whatever the cuts."""

from __future__ import annotations

import pytest

from chiasm.gateway.answer_text import AnswerText
from chiasm.gateway.stop_strings import StopStrings
from chiasm.gateway.tokenizer import Tokenizer
from tests.fakes.tokenizers import make_tokenizer

TOKENIZER = Tokenizer(make_tokenizer())
TEXT = "a STOP b STOP c"
TOKENS = TOKENIZER.encode(TEXT)


def _read(min_tokens: int, step: int) -> tuple[str, str]:
    stops = StopStrings(["STOP"])
    answer = AnswerText(TOKENIZER.detokenizer(), stops, frozenset({7}), min_tokens)
    steps = [TOKENS[start : start + step] for start in range(0, len(TOKENS), step)]
    text = "".join(answer.feed(token_ids).text for token_ids in steps)
    return text + answer.flush(), answer.stop_string


def _num_tokens(text: str) -> int:
    num_tokens = len(TOKENIZER.encode(text))
    assert TOKENIZER.encode(TEXT)[:num_tokens] == TOKENIZER.encode(text)
    return num_tokens


@pytest.mark.parametrize("step", [1, 2, 3, len(TOKENS)])
def test_stop_strings_within_the_least_tokens_do_not_count(step: int) -> None:
    first, second = _num_tokens("a STOP"), _num_tokens("a STOP b STOP")

    assert _read(0, step) == ("a ", "STOP")
    assert _read(first - 1, step) == (TOKENIZER.decode(TOKENS[: first - 1]), "STOP")
    assert _read(first, step) == ("a STOP b ", "STOP")
    assert _read(second, step) == (TEXT, "")
    assert _read(10 * second, step) == (TEXT, "")


@pytest.mark.parametrize("step", [1, 2, 3, len(TOKENS)])
def test_tokens_after_the_one_that_completes_a_stop_string_do_not_count(step: int) -> None:
    answer = AnswerText(TOKENIZER.detokenizer(), StopStrings(["STOP"]), frozenset())
    num_tokens = 0
    for start in range(0, len(TOKENS), step):
        num_tokens += answer.feed(TOKENS[start : start + step]).num_tokens
        if answer.stop_string:
            break

    assert num_tokens == _num_tokens("a STOP")


@pytest.mark.parametrize("min_tokens", range(_num_tokens("a STOP")))
def test_a_stop_string_that_begins_within_the_least_tokens_ends_the_answer_behind_them(
    min_tokens: int,
) -> None:
    answer = AnswerText(TOKENIZER.detokenizer(), StopStrings(["STOP"]), frozenset(), min_tokens)

    added = answer.feed(TOKENS)

    assert answer.stop_string == "STOP"
    assert added.num_tokens == _num_tokens("a STOP")
    assert added.text == max("a ", TOKENIZER.decode(TOKENS[:min_tokens]), key=len)


def test_stop_tokens_leave_no_text_whether_they_count_or_not() -> None:
    token_ids = [7, *TOKENS, 7]
    for min_tokens in (0, 1, len(token_ids)):
        stops = StopStrings(())
        answer = AnswerText(TOKENIZER.detokenizer(), stops, frozenset({7}), min_tokens)
        assert answer.feed(token_ids).text + answer.flush() == TEXT
