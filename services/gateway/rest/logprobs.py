"""Write log probabilities as OpenAI's clients read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..chat_events import TokenLogprobs

# JSON has no infinity; OpenAI writes this for tokens that cannot come.
_LEAST = -9999.0


class TokenBytes(Protocol):
    """Gives the bytes of a token."""

    def __call__(self, token_id: int, *, is_first: bool = False) -> bytes:
        """Return the bytes that ``token_id`` adds to an answer, at its start if ``is_first``."""
        ...


def logprobs_to_json(
    logprobs: Sequence[TokenLogprobs], bytes_of: TokenBytes, *, is_start: bool = True
) -> bytes:
    """Return the value of ``choices[].logprobs``.

    Args:
        logprobs: Of each token, in order; ``null`` is returned if there are none.
        bytes_of: Bytes of a token.
        is_start: Whether the answer starts with these tokens.
    """
    if not logprobs:
        return b"null"
    content = []
    for index, one in enumerate(logprobs):
        is_first = is_start and index == 0
        alternatives = zip(one.top_token_ids, one.top_logprobs, strict=True)
        top = [
            _entry(bytes_of(top_id, is_first=is_first), logprob) for top_id, logprob in alternatives
        ]
        entry = _entry(bytes_of(one.token_id, is_first=is_first), one.logprob)
        content.append({**entry, "top_logprobs": top})
    return orjson.dumps({"content": content, "refusal": None})


def prompt_logprobs_to_json(logprobs: Sequence[TokenLogprobs], bytes_of: TokenBytes) -> bytes:
    """Return the value of ``prompt_logprobs`` as vLLM writes it: ``null`` for the first token.

    Args:
        logprobs: Of each token of the prompt but the first, in order.
        bytes_of: Bytes of a token.
    """
    prompt: list[dict[str, object] | None] = [None]
    for one in logprobs:
        entries: dict[str, object] = {}
        entries[str(one.token_id)] = _prompt_entry(bytes_of(one.token_id), one.logprob, one.rank)
        alternatives = zip(one.top_token_ids, one.top_logprobs, strict=True)
        for index, (token_id, logprob) in enumerate(alternatives):
            entry = _prompt_entry(bytes_of(token_id), logprob, index + 1)
            entries.setdefault(str(token_id), entry)
        prompt.append(entries)
    return orjson.dumps(prompt)


def _prompt_entry(data: bytes, logprob: float, rank: int) -> dict[str, object]:
    return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": _text(data)}


def _entry(data: bytes, logprob: float) -> dict[str, object]:
    return {"token": _text(data), "logprob": max(logprob, _LEAST), "bytes": list(data)}


def _text(data: bytes) -> str:
    """Return the text of a token; a part of a character is U+FFFD in it."""
    return data.decode("utf-8", "replace")
