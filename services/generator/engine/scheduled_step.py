"""Say what one step computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence in a step: ``num_tokens`` tokens behind the ``start`` scheduled ones.

    Attributes:
        sequence: The sequence.
        start: Position of its first token of the step.
        num_tokens: Tokens; 0 for a fork, which only samples from the logits of ``forked_from``.
        samples: Whether the step brings it a new token; not so for a chunk that is not its last.
        epoch: Its number of preemptions when it was scheduled; another number tells that its
            blocks have been taken since.
        forked_from: Sequence of the same step that computes the prompt of both.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool = True
    epoch: int = 0
    forked_from: Sequence | None = None

    @property
    def end(self) -> int:
        """Position behind its last token of the step."""
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether one generated token is added to a computed context."""
        return self.num_tokens == 1 and self.start >= self.sequence.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The sequences of one step, those that decode first; their blocks are allocated.

    Attributes:
        sequences: What is computed.
        num_preemptions: Sequences whose blocks were taken to make room.
        num_queried_tokens: Tokens of the sequences that were looked up in the prefix cache.
        num_cached_tokens: Those of them that were found.
        block_copies: Blocks that are copied before anything is written.
    """

    sequences: tuple[ScheduledSequence, ...]
    num_preemptions: int = 0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0
    block_copies: tuple[BlockCopy, ...] = ()

    @property
    def num_decode_tokens(self) -> int:
        """Sequences that decode."""
        return sum(scheduled.is_decode for scheduled in self.sequences)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all others."""
        return sum(scheduled.num_tokens for scheduled in self.sequences if not scheduled.is_decode)
