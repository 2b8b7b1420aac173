"""Turn a stream of token ids into a stream of text that never splits a character."""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 64


class Detokenizer(Protocol):
    """Incremental detokenizer of one sequence; the texts joined are the text of the tokens."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that ``token_ids`` complete; an unfinished character is held back."""
        ...

    def flush(self) -> str:
        """Return what is held back; call once, at the end."""
        ...


class ByteLevelDetokenizer:
    """Detokenizer for byte-level vocabularies: every token is a string of bytes.

    Constant time per token. Bytes that are not UTF-8 become U+FFFD as they do in the whole decode.

    Source: byte-to-character table of GPT-2, Radford et al. 2019.
    """

    def __init__(self, token_of: Callable[[int], str | None], special_ids: frozenset[int]) -> None:
        """Start a sequence.

        Args:
            token_of: Gives the vocabulary's spelling of a token id; ``None`` if unknown.
            special_ids: Ids that leave no text.
        """
        self._token_of = token_of
        self._special_ids = special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that ``token_ids`` complete."""
        data = b"".join(
            bytes_of_token(self._token_of(token_id) or "")
            for token_id in token_ids
            if token_id not in self._special_ids
        )
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return U+FFFD if a character is unfinished, else nothing."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Detokenizer for any vocabulary: decodes a short window and emits what is new in it.

    ``_context`` are the last emitted tokens, which the decoder needs to place spaces; ``_held``
    are tokens whose text ends inside a character. A character has at most four bytes, so text
    that stays broken for longer is broken for good and is emitted as it is.

    Source: the prefix and read offsets of huggingface/text-generation-inference.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], special_ids: frozenset[int] = frozenset()
    ) -> None:
        """Start a sequence.

        Args:
            decode: Gives the text of a list of tokens.
            special_ids: Ids that leave no text.
        """
        self._decode = decode
        self._special_ids = special_ids
        self._context: list[int] = []
        self._held: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that ``token_ids`` complete."""
        return "".join(
            self._feed_one(token_id) for token_id in token_ids if token_id not in self._special_ids
        )

    def flush(self) -> str:
        """Return the text of the tokens held back."""
        return self._emit() if self._held else ""

    def _feed_one(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._emit() if text else ""

    def _emit(self) -> str:
        text = self._new_text()
        self._context, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode([*self._context, *self._held])[len(before) :]


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


@lru_cache(maxsize=65536)
def bytes_of_token(token: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary spells."""
    table = _byte_of_char()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode("utf-8")
