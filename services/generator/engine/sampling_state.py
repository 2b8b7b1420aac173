"""Remember what the rules of one sequence depend on: the tokens so far."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chiasm.generator.engine.sampling_params import SamplingParams


class SamplingState:
    """Tokens of one sequence, as the sampler has drawn them.

    The forward thread owns it: a step is sampled before the tokens of the step before have reached
    the engine. A preempted sequence keeps it, since its tokens stay the same.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Iterable[int]) -> None:
        self.params = params
        self.prompt_token_ids = frozenset(prompt_token_ids) if params.has_penalties else frozenset()
        self.output_counts: Counter[int] = Counter()
        self.grammar = params.grammar.start() if params.grammar else None
        self._tail: list[int] = []
        self._max_tail = max((len(word) for word in params.bad_words), default=1) - 1
        self._num_output_tokens = 0

    @property
    def failure(self) -> str:
        """Why the sequence cannot go on; empty while it can."""
        return self.grammar.failure if self.grammar else ""

    @property
    def may_not_stop(self) -> bool:
        """Whether it has fewer tokens than it must have."""
        return self._num_output_tokens < self.params.min_tokens

    def find_bad_tokens(self) -> list[int]:
        """Return the tokens that would complete a bad word."""
        return [word[-1] for word in self.params.bad_words if _ends_with(self._tail, word[:-1])]

    def advance(self, token: int) -> None:
        """Take note of the next token."""
        self._num_output_tokens += 1
        if self.grammar is not None:
            self.grammar.advance(token)
        if self.params.has_penalties:
            self.output_counts[token] += 1
        if self._max_tail:
            self._tail = [*self._tail, token][-self._max_tail :]


def _ends_with(tail: Sequence[int], beginning: Sequence[int]) -> bool:
    return not beginning or tuple(tail[-len(beginning) :]) == tuple(beginning)
