"""What the pipeline answers with: a stream of deltas, the last of which says why it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from .media_object import MediaReceipt


# Each of them has up to 20 alternatives with their texts.
_MAX_SCORED_TOKENS_ON_LOOP = 64


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for a request so far; media placeholders count expanded.

    ``media`` tells of each media item, in the order of the prompt, when the last answer has ended.
    """

    num_prompt_tokens: int = 0
    num_media_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    media: tuple[MediaReceipt, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an answer ended.

    Attributes:
        reason: ``stop`` or ``length``.
        stop_string: Stop string that ended it; empty: none.
        stop_token_id: Stop token of the request, not of the model, that ended it.
    """

    reason: str
    stop_string: str = ""
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token of the answer was, by the model's own distribution.

    Attributes:
        token_id: The token.
        logprob: Its log probability.
        rank: 1 for the most likely token of the vocabulary.
        top_token_ids: Most likely tokens, the best first.
        top_logprobs: Their log probabilities.
    """

    token_id: int
    logprob: float
    rank: int
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """A piece of an answer.

    Attributes:
        text: Text added; may be empty.
        token_ids: Tokens added; may run ahead of the text.
        usage: Tokens counted so far.
        finish: Set in the last delta of an answer.
        logprobs: How likely the tokens were; empty unless asked for.
        index: Which of the answers it belongs to.
        prompt_logprobs: How likely further tokens of the prompt were; comes before any text.
    """

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish: Finish | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every message of an answer repeats.

    Attributes:
        request_id: Id of the call.
        model: Served model name.
        created_s: Start of the call, seconds since the Unix epoch.
    """

    request_id: str
    model: str
    created_s: int


@dataclass(frozen=True, slots=True)
class WholeChoice:
    """All deltas of one answer together."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """All answers to a request, at least one, and what they cost together.

    Attributes:
        choices: The answers.
        usage: Tokens counted.
        prompt_logprobs: How likely the prompt's tokens were, but for the first; empty unless asked
            for.
    """

    choices: tuple[WholeChoice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def is_long(self) -> bool:
        """Whether it takes so long to write that an event loop had better not do it."""
        num_scored = len(self.prompt_logprobs) + sum(len(one.logprobs) for one in self.choices)
        return num_scored > _MAX_SCORED_TOKENS_ON_LOOP


async def collect(deltas: AsyncIterator[ChatDelta]) -> WholeAnswer:
    """Return all deltas of a request together.

    Raises:
        ChiasmError: An answer failed.
    """
    by_index: dict[int, list[ChatDelta]] = {}
    usage = Usage()
    prompt_logprobs: list[TokenLogprobs] = []
    async for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
        usage = delta.usage
        prompt_logprobs += delta.prompt_logprobs
    choices = tuple(_join(by_index[index]) for index in sorted(by_index))
    return WholeAnswer(choices, usage, tuple(prompt_logprobs))


def _join(deltas: Sequence[ChatDelta]) -> WholeChoice:
    finish = deltas[-1].finish
    assert finish is not None, "the last delta says why the answer ended"
    return WholeChoice(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish=finish,
        logprobs=tuple(one for delta in deltas for one in delta.logprobs),
    )
