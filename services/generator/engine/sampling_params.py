"""Say how the tokens of one sequence are chosen and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved wishes of a request; every default is filled in.

    Attributes:
        max_tokens: Most tokens to generate; at least 1 and within the context length.
        seed: Fixes the draw at each position, below 2**64; random if the client gave none.
        temperature: Divisor of the logits; below ``GREEDY_TEMPERATURE`` the best token is taken.
        top_k: Most tokens kept; 0 keeps all.
        top_p: Smallest probability mass kept, in (0, 1].
        stop_token_ids: Tokens that end the sequence, the model's own included unless ignored.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: frozenset[int] = frozenset()

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken without a draw."""
        return self.temperature < GREEDY_TEMPERATURE
