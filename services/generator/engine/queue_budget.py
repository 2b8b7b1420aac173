"""Bound what waits: sequences and tokens in the queue, bytes of embeddings in host memory."""

from __future__ import annotations

from dataclasses import dataclass

from chiasm.common import metrics
from chiasm.common.errors import OverloadedError

_RETRY_AFTER_S = 1.0
# Texts and reasons of vLLM, so that clients that look for them find them.
_BUSY = (
    "The engine is currently busy and cannot accept new requests. Please try again later or on a"
    " different instance."
)
_BACKLOG = (
    "The engine has reached its prefill token backlog limit. Please try again later or on a"
    " different instance."
)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of admission.

    Attributes:
        max_waiting_sequences: Sequences that have not had their first token.
        max_waiting_tokens: Prompt tokens of those; an empty queue takes any prompt.
        max_embedding_bytes: Bytes of the embeddings of all live sequences; none alive: any.
    """

    max_waiting_sequences: int
    max_waiting_tokens: int
    max_embedding_bytes: int


class QueueBudget:
    """Counts what admitted sequences hold; belongs to the event loop."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._embedding_bytes = 0

    @property
    def num_waiting(self) -> int:
        """Admitted sequences without a first token."""
        return self._num_waiting

    @property
    def embedding_bytes(self) -> int:
        """Bytes of embeddings that live sequences hold or will hold."""
        return self._embedding_bytes

    def admit(self, num_tokens: int, embedding_bytes: int) -> Charge:
        """Count a new sequence in.

        Args:
            num_tokens: Tokens of its prompt.
            embedding_bytes: Bytes of its embeddings.

        Returns:
            The charge; it must be released when the sequence ends.

        Raises:
            OverloadedError: A bound is reached. Nothing was counted.
        """
        limits = self._limits
        num_waiting_tokens = self._num_waiting_tokens + num_tokens
        total_bytes = self._embedding_bytes + embedding_bytes
        if self._num_waiting >= limits.max_waiting_sequences:
            raise OverloadedError(_BUSY, retry_after_s=_RETRY_AFTER_S)
        if self._num_waiting and num_waiting_tokens > limits.max_waiting_tokens:
            raise OverloadedError(_BACKLOG, retry_after_s=_RETRY_AFTER_S)
        is_crowded = self._embedding_bytes and total_bytes > limits.max_embedding_bytes
        if embedding_bytes and is_crowded:
            raise OverloadedError(_BUSY, retry_after_s=_RETRY_AFTER_S)
        self._count(1, num_tokens)
        self._embedding_bytes = total_bytes
        return Charge(self, num_tokens, _Hold(self, embedding_bytes))

    def admit_group(
        self, num_tokens: int, embedding_bytes: int, num_sequences: int
    ) -> list[Charge]:
        """Count new sequences in that share a prompt, which counts once; see ``admit``.

        The embeddings count until the last of them ends.

        Raises:
            OverloadedError: A bound is reached. Nothing was counted.
        """
        charges = [self.admit(num_tokens, embedding_bytes)]
        try:
            for _ in range(num_sequences - 1):
                charges.append(self.admit(0, 0))
                charges[-1].share_embeddings(charges[0])
        except OverloadedError:
            for charge in charges:
                charge.release()
            raise
        return charges

    def _count(self, num_sequences: int, num_tokens: int) -> None:
        self._num_waiting += num_sequences
        self._num_waiting_tokens += num_tokens
        metrics.GENERATOR_QUEUE_TOKENS.set(self._num_waiting_tokens)

    def _discharge(self, embedding_bytes: int) -> None:
        self._embedding_bytes -= embedding_bytes


class _Hold:
    """Embeddings that some sequences hold together."""

    def __init__(self, budget: QueueBudget, num_bytes: int) -> None:
        self._budget = budget
        self._num_bytes = num_bytes
        self._num_sequences = 1

    def join(self) -> None:
        self._num_sequences += 1

    def leave(self) -> None:
        self._num_sequences -= 1
        if not self._num_sequences:
            self._budget._discharge(self._num_bytes)


class Charge:
    """What one sequence counts for in a ``QueueBudget``."""

    def __init__(self, budget: QueueBudget, num_tokens: int, hold: _Hold) -> None:
        self._budget = budget
        self._num_tokens = num_tokens
        self._hold = hold
        self._is_waiting = True
        self._is_released = False

    def share_embeddings(self, other: Charge) -> None:
        """Hold the embeddings of ``other``, too, in place of its own."""
        self._hold.leave()
        self._hold = other._hold
        self._hold.join()

    def leave_queue(self) -> None:
        """Stop counting as waiting; harmless if done before."""
        if self._is_waiting:
            self._is_waiting = False
            self._budget._count(-1, -self._num_tokens)

    def release(self) -> None:
        """Stop counting at all; harmless if done before."""
        self.leave_queue()
        if not self._is_released:
            self._is_released = True
            self._hold.leave()
