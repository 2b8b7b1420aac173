"""Decide how far a prefill may go in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chiasm.generator.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunking:
    """Where prefills are cut.

    Attributes:
        fixed_tokens: In deterministic mode, prompts are cut at multiples of this many tokens,
            whatever else is in the step, and outputs are recomputed one by one as they were
            computed; 0 cuts where the budget ends.
        min_early_tokens: Fewest tokens before a missing embedding that are worth a step of their
            own: a step has a price whatever is in it, and who encodes may share the processor.
    """

    fixed_tokens: int = 0
    min_early_tokens: int = 1

    @property
    def is_fixed(self) -> bool:
        """Whether cuts do not depend on the budget."""
        return self.fixed_tokens > 0

    def is_early(self, sequence: Sequence, start: int, is_first: bool) -> bool:
        """Return whether ``sequence`` had better wait for its next embedding.

        Args:
            sequence: Sequence that may lack embeddings.
            start: First position to compute.
            is_first: Whether nothing else is in the step.
        """
        num_ready = sequence.num_ready_tokens
        is_cut = num_ready < sequence.num_total_tokens
        return is_cut and num_ready - start < (self.min_early_tokens if is_first else 1)

    def count_tokens(self, sequence: Sequence, start: int, budget: int, is_first: bool) -> int:
        """Return how many tokens of ``sequence`` to compute from ``start`` on.

        Args:
            sequence: Sequence whose ``num_ready_tokens`` bounds the chunk.
            start: First position to compute.
            budget: Tokens left in the step.
            is_first: Whether nothing else is in the step; then a piece that cannot be cut may
                exceed the budget, since it would otherwise wait for ever.

        Returns:
            Tokens; 0 if nothing can be computed now.
        """
        end = sequence.num_ready_tokens
        if self.is_fixed:
            wanted = self._fixed_end(sequence, start)
            fits = wanted <= end and (is_first or wanted - start <= budget)
            return wanted - start if fits else 0
        cut = min(end, start + budget)
        return _uncut_span(sequence, start, cut, may_exceed=is_first) - start

    def most_tokens(self, sequence: Sequence, budget: int) -> int:
        """Return the most tokens of ``sequence`` that are computed in one step of ``budget``."""
        groups = (span.both_ways for span in sequence.prompt.spans)
        sizes = [group[1] - group[0] for group in groups if group]
        return max([budget, self.fixed_tokens, *sizes])

    def align_prefix(self, sequence: Sequence, num_tokens: int) -> int:
        """Return the part of a cached prefix that may be used: no span and no chunk is cut."""
        if self.is_fixed:
            num_tokens = min(num_tokens, sequence.num_prompt_tokens)
            num_tokens -= num_tokens % self.fixed_tokens
        return _uncut_span(sequence, 0, num_tokens, may_exceed=False)

    def _fixed_end(self, sequence: Sequence, start: int) -> int:
        if start >= sequence.num_prompt_tokens:
            return start + 1
        end = start - start % self.fixed_tokens + self.fixed_tokens
        end = _uncut_span(sequence, start, end, may_exceed=True)
        return min(end, sequence.num_prompt_tokens)


def _uncut_span(sequence: Sequence, start: int, cut: int, may_exceed: bool) -> int:
    """Move ``cut`` out of positions that attend both ways: before them, or else behind them."""
    for span in sequence.prompt.spans:
        first, end = span.both_ways or (cut, cut)
        if first < cut < end:
            if first > start or not may_exceed:
                return max(first, start)
            return min(end, max(cut, sequence.num_ready_tokens))
    return cut
