"""Find and disarm spellings of special tokens in text that a client wrote.

The tokenizer turns every spelling of an added token into that token, wherever it stands. Text of a
client must not gain that power: a ``<|im_end|>`` in a question would end the question. Such
spellings are replaced by sentinels before the chat template is rendered; the sentinels come back
as plain characters when the prompt is encoded.

Two pieces of client text may also form a spelling where they meet, so a piece that ends in the
start of a spelling, or starts with the end of one, gets a sentinel there too.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_OPEN = "\ue000"
_CLOSE = "\ue001"


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rendered text; ``is_literal`` if it is client text that must stay plain."""

    text: str
    is_literal: bool


class Spellings:
    """The spellings of a set of added tokens, ready to be searched for."""

    def __init__(self, contents: Iterable[str]) -> None:
        """Prepare the search.

        Args:
            contents: Spellings of added tokens. Whitespace ones are left out: tokenizers with
                tokens for runs of blanks mean them to be used for ordinary text.
        """
        self.contents = tuple(
            sorted({text for text in contents if text.strip()}, key=lambda text: (-len(text), text))
        )
        self.pattern = re.compile("|".join(map(re.escape, self.contents)) or r"(?!)")

    @cached_property
    def _starts(self) -> frozenset[str]:
        return frozenset(text[:end] for text in self.contents for end in range(1, len(text)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(text[start:] for text in self.contents for start in range(1, len(text)))

    def num_chars_of_start_at_end(self, text: str) -> int:
        """Return how many last characters of ``text`` are the start of a spelling."""
        longest = min(len(text), len(self.contents[0]) - 1) if self.contents else 0
        return next((n for n in range(longest, 0, -1) if text[-n:] in self._starts), 0)

    def num_chars_of_end_at_start(self, text: str) -> int:
        """Return how many first characters of ``text`` are the end of a spelling."""
        longest = min(len(text), len(self.contents[0]) - 1) if self.contents else 0
        return next((n for n in range(longest, 0, -1) if text[:n] in self._ends), 0)


class TextGuard:
    """Replaces spellings in the texts of one request and finds them again in the rendered prompt.

    The sentinels hold a random number, so that a client cannot write one.
    """

    def __init__(self, spellings: Spellings) -> None:
        self._spellings = spellings
        self._literals: list[str] = []
        nonce = f"{_OPEN}{secrets.randbits(64)}."
        self._nonce = nonce
        self._sentinel = re.compile(f"{re.escape(nonce)}([0-9]+){_CLOSE}")

    @property
    def is_used(self) -> bool:
        """Whether any sentinel was made."""
        return bool(self._literals)

    def protect(self, text: str, spellings: Spellings | None = None) -> str:
        """Return ``text`` with sentinels in place of spellings; the same object if it has none.

        Args:
            text: What a client wrote.
            spellings: What to look for; ``None``: all that the guard was made for.
        """
        spellings = spellings or self._spellings
        head = spellings.num_chars_of_end_at_start(text)
        body = spellings.pattern.sub(lambda match: self._replace(match[0]), text[head:])
        tail = spellings.num_chars_of_start_at_end(body)
        if not (head or tail or len(body) != len(text) or body != text):
            return text
        start = self._replace(text[:head]) if head else ""
        if not tail:
            return start + body
        return start + body[:-tail] + self._replace(body[-tail:])

    def split(self, rendered: str) -> list[Piece]:
        """Return the pieces of a rendered prompt, sentinels resolved."""
        pieces = []
        end = 0
        for match in self._sentinel.finditer(rendered):
            pieces.append(Piece(rendered[end : match.start()], is_literal=False))
            pieces.append(Piece(self._literals[int(match[1])], is_literal=True))
            end = match.end()
        pieces.append(Piece(rendered[end:], is_literal=False))
        return [piece for piece in pieces if piece.text]

    def _replace(self, spelling: str) -> str:
        self._literals.append(spelling)
        return f"{self._nonce}{len(self._literals) - 1}{_CLOSE}"
