"""Turn the tokens of one answer into the text that the client sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .detokenizer import Detokenizer
    from .stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class AddedText:
    """What tokens added to an answer.

    Attributes:
        text: The text.
        num_tokens: How many of the tokens belong to the answer: all, or those up to the one that
            completed a stop string.
    """

    text: str
    num_tokens: int


class AnswerText:
    """Detokenises one answer, leaves out its stop token and ends it at a stop string."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings,
        stop_token_ids: frozenset[int],
        min_tokens: int = 0,
    ) -> None:
        """Start an answer.

        Args:
            detokenizer: Fresh detokenizer of the model.
            stops: Stop strings of the request.
            stop_token_ids: Tokens that end the answer and are not shown.
            min_tokens: Tokens in whose text no stop string ends; all of it is shown.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_token_ids = stop_token_ids
        self._num_free_tokens = min_tokens

    @property
    def stop_string(self) -> str:
        """The stop string that ended the answer; empty while none did."""
        return self._stops.matched

    def feed(self, token_ids: Sequence[int]) -> AddedText:
        """Return what ``token_ids`` add, however many of them come together."""
        if self._stops.is_empty:
            return AddedText(self._detokenizer.feed(self._shown(token_ids)), len(token_ids))
        texts = []
        for token_id in token_ids:
            texts.append(self._feed_one(token_id))
            if self._stops.matched:
                break
        return AddedText("".join(texts), len(texts))

    def flush(self) -> str:
        """Return what was held back; the answer ended without a stop string."""
        text = self._stops.feed(self._detokenizer.flush())
        return text if self._stops.matched else text + self._stops.flush()

    def _feed_one(self, token_id: int) -> str:
        text = self._detokenizer.feed(self._shown([token_id]))
        if self._num_free_tokens:
            self._num_free_tokens -= 1
            return self._stops.skip(text)
        return self._stops.feed(text)

    def _shown(self, token_ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id not in self._stop_token_ids]
