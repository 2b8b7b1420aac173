"""Say how the tokens of one sequence are chosen and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.generator.engine.grammar import Grammar

GREEDY_TEMPERATURE = 1e-5
_NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved wishes of a request; every default is filled in.

    Attributes:
        max_tokens: Most tokens to generate; at least 1 and within the context length.
        seed: Fixes the draw at each position, below 2**64; random if the client gave none.
        temperature: Divisor of the logits; below ``GREEDY_TEMPERATURE`` the best token is taken.
        top_k: Most tokens kept; 0 keeps all.
        top_p: Smallest probability mass kept, in (0, 1].
        min_p: Least probability kept, as a part of the best token's, in [0, 1].
        stop_token_ids: Tokens that end the sequence, the model's own included unless ignored.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that prompt or
            output have; 1 does nothing.
        presence_penalty: Taken from the logits of tokens that the output has.
        frequency_penalty: Taken from them as often as the output has them.
        logit_bias: Added to the logits of tokens.
        bad_words: Token sequences that the output must not have.
        allowed_token_ids: Only tokens that may be taken; empty allows all.
        min_tokens: Tokens before which no stop token is taken.
        num_logprobs: Alternatives whose log probabilities are told with each token; ``None`` tells
            nothing, 0 the token's own.
        num_prompt_logprobs: Alternatives to tell with each token of the prompt; ``None`` tells
            nothing of the prompt.
        grammar: What the output must look like; ``None`` for anything.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: frozenset[int] = frozenset()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken without a draw."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were there before count for less, or more."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return any(penalties)

    @property
    def has_rules(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        masks = self.bad_words or self.allowed_token_ids or self.min_tokens or self.grammar
        return self.has_penalties or bool(self.logit_bias or masks)
