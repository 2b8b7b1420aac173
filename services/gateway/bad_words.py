"""Turn words that an answer must not have into the token sequences that spell them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def encode_bad_words(
    words: Sequence[str], encode: Callable[[str], list[int]]
) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of ``words``, at the beginning of a text and behind a space.

    A word behind a space has tokens of its own in most vocabularies; it counts if it begins with
    another token and has as many.

    Source: the rule of vLLM's ``bad_words``.
    """
    sequences = []
    for word in words:
        bare = tuple(encode(word.lstrip()))
        spaced = tuple(encode(f" {word.lstrip()}"))
        sequences.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences.append(spaced)
    return tuple(sequences)
