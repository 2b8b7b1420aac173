"""Remember what the rules of one sequence depend on: the tokens so far."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

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
        # Tensors, made once: a list of this length in every step would hold up all sequences.
        prompt = set(prompt_token_ids) if params.repetition_penalty != 1.0 else set()
        self.seen_token_ids = torch.tensor(sorted(prompt), dtype=torch.int64)
        self.allowed_token_ids = torch.tensor(params.allowed_token_ids, dtype=torch.int64)
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
            if self.params.repetition_penalty != 1.0 and not self.output_counts[token]:
                # A token of the prompt may stand here twice; it is penalised once all the same.
                self.seen_token_ids = torch.cat([self.seen_token_ids, torch.tensor([token])])
            self.output_counts[token] += 1
        if self._max_tail:
            self._tail = [*self._tail, token][-self._max_tail :]


def _ends_with(tail: Sequence[int], beginning: Sequence[int]) -> bool:
    return not beginning or tuple(tail[-len(beginning) :]) == tuple(beginning)
