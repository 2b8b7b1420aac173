"""Lay questions and answers out as the token sequences that the model learns from.

Several questions about the same pictures share one prefix and do not see each other: tokens carry
a segment, 0 for what all share, and the positions of every segment go on after the prefix::

    segment   0 0 0 0 0 0 0 0 | 1 1 1 1 1 1 | 2 2 2 2 2
    token     <user> <picture>| Q1  A1      | Q2  A2
    position  0 1 2 ... p     | p+1 ...     | p+1 ...

A conversation of several turns is one segment. Only answers, each with its <|im_end|>, are learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from .tokenizer import token_id

IGNORED = -100
Grid = tuple[int, int]


@dataclass(slots=True)
class TokenSequence:
    """Tokens with their positions, segments and targets, all of the same length."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class ConversationWriter:
    """Append prompt and answer tokens to a ``TokenSequence``, segment by segment."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._image_id = token_id(tokenizer, "<|image_pad|>")
        self.sequence = TokenSequence()
        self._segment = 0
        self._next = 0
        self._fork: int | None = None

    def start_segment(self) -> None:
        """Begin a segment that sees the prefix and nothing else."""
        if self._fork is None:
            self._fork = self._next
        self._next = self._fork
        self._segment += 1

    def add_system(self, text: str) -> None:
        """Append a system message."""
        self._add_text(f"<|im_start|>system\n{text}<|im_end|>\n")

    def open_user(self) -> None:
        """Append the head of a user's message."""
        self._add_text("<|im_start|>user\n")

    def add_pictures(self, grids: Sequence[Grid]) -> None:
        """Append the placeholders of pictures with these rows and columns of merged cells."""
        for rows, columns in grids:
            self._add_text("<|vision_start|>")
            at = self._next
            for row in range(rows):
                for column in range(columns):
                    self._append(self._image_id, (at, at + row, at + column), IGNORED)
            self._next = at + max(rows, columns)
            self._add_text("<|vision_end|>")

    def add_question(self, question: str) -> None:
        """Append text of the user's message."""
        self._add_text(question)

    def add_answer(self, answer: str) -> None:
        """Close the user's message and append the answer, which is learned."""
        self.open_answer()
        self._add_text(f"{answer}<|im_end|>", is_target=True)

    def open_answer(self) -> None:
        """Close the user's message and append the head of the assistant's."""
        self._add_text("<|im_end|>\n<|im_start|>assistant\n")

    def close_turn(self) -> None:
        """Append what stands between an answer and the next message."""
        self._add_text("\n")

    def _add_text(self, text: str, is_target: bool = False) -> None:
        for token in self._tokenizer.encode(text, add_special_tokens=False).ids:
            at = self._next
            self._append(token, (at, at, at), token if is_target else IGNORED)
            self._next += 1

    def _append(self, token: int, position: tuple[int, int, int], target: int) -> None:
        self.sequence.token_ids.append(token)
        self.sequence.positions.append(position)
        self.sequence.segments.append(self._segment)
        self.sequence.targets.append(target)
