"""Write log probabilities as OpenAI's clients read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..chat_events import TokenLogprobs

    TokenText = Callable[[int], str]

# JSON has no infinity; OpenAI writes this for tokens that cannot come.
_LEAST = -9999.0


def logprobs_to_json(logprobs: Sequence[TokenLogprobs], text_of: TokenText) -> bytes:
    """Return the value of ``choices[].logprobs``.

    Args:
        logprobs: Of each token, in order; ``null`` is returned if there are none.
        text_of: Text of a token on its own.
    """
    if not logprobs:
        return b"null"
    content = [
        {
            **_entry(text_of(one.token_id), one.logprob),
            "top_logprobs": [
                _entry(text_of(token_id), logprob)
                for token_id, logprob in zip(one.top_token_ids, one.top_logprobs, strict=True)
            ],
        }
        for one in logprobs
    ]
    return orjson.dumps({"content": content, "refusal": None})


def prompt_logprobs_to_json(logprobs: Sequence[TokenLogprobs], text_of: TokenText) -> bytes:
    """Return the value of ``prompt_logprobs`` as vLLM writes it: ``null`` for the first token.

    Args:
        logprobs: Of each token of the prompt but the first, in order.
        text_of: Text of a token on its own.
    """
    prompt: list[dict[str, object] | None] = [None]
    for one in logprobs:
        entries: dict[str, object] = {}
        entries[str(one.token_id)] = _prompt_entry(text_of(one.token_id), one.logprob, one.rank)
        alternatives = zip(one.top_token_ids, one.top_logprobs, strict=True)
        for index, (token_id, logprob) in enumerate(alternatives):
            entry = _prompt_entry(text_of(token_id), logprob, index + 1)
            entries.setdefault(str(token_id), entry)
        prompt.append(entries)
    return orjson.dumps(prompt)


def _prompt_entry(text: str, logprob: float, rank: int) -> dict[str, object]:
    return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": text}


def _entry(text: str, logprob: float) -> dict[str, object]:
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(text.encode())}
