"""Bad words are forbidden at the beginning of a text and behind a space."""

from __future__ import annotations

from chiasm.common.limits import Limits
from chiasm.common.sampling import SamplingWishes, check_wishes
from chiasm.gateway.bad_words import encode_bad_words

VOCABULARY = {"cat": [1], " cat": [2], "dog": [3, 4], " dog": [5], "x": [6], " x": [6]}


def test_word_behind_a_space_counts_where_it_has_as_many_tokens_of_its_own() -> None:
    words = ["cat", "dog", "x", "  cat"]

    assert encode_bad_words(words, VOCABULARY.__getitem__) == ((1,), (2,), (3, 4), (6,), (1,), (2,))


def test_generator_takes_the_sequences_of_as_many_words_as_a_request_may_have() -> None:
    limits = Limits()
    sequences = encode_bad_words(["cat"] * limits.max_bad_words, VOCABULARY.__getitem__)

    check_wishes(SamplingWishes(bad_words=sequences), limits)

    assert len(sequences) == 2 * limits.max_bad_words
