"""Tell how likely a token was, and which others would have been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model's own distribution.

    Attributes:
        logprob: Log probability of the token.
        rank: 1 for the most likely token of the vocabulary.
        top_token_ids: Most likely tokens, the best first.
        top_logprobs: Their log probabilities.
    """

    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def compute_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], num_alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """Return the log probabilities of the tokens that were chosen.

    Args:
        logits: As the model gave them. [num_rows, vocab_size], any float type.
        tokens: The token of each row.
        num_alternatives: Alternatives to tell for each row.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    width = min(max(num_alternatives), logits.shape[1])
    top = logprobs.topk(width, dim=-1)
    rows = zip(
        chosen[:, 0].tolist(),
        ranks.tolist(),
        top.indices.tolist(),
        top.values.tolist(),
        num_alternatives,
        strict=True,
    )
    return [
        TokenLogprobs(logprob, rank, tuple(top_ids[:count]), tuple(top_logprobs[:count]))
        for logprob, rank, top_ids, top_logprobs, count in rows
    ]
