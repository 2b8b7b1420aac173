"""Choose the next token of every sequence of a step at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.generator.engine.sampling_params import SamplingParams

_FIRST_NUCLEUS = 64
_NUCLEUS_GROWTH = 8
_MASK_64 = (1 << 64) - 1


class Sampler:
    """Greedy and sampled choice, batched; no vocabulary is ever sorted whole unless it must be.

    A draw depends on nothing but the row's logits, its parameters, its seed and its position: the
    uniform number is a hash of seed and position, and the token is found by inverting the
    cumulative distribution in the order of token ids. The batch around a row does not matter.
    """

    def sample(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> list[int | None]:
        """Return the next token of each row; ``None`` where the logits are not finite.

        Args:
            logits: [num_rows, vocab_size], any float type.
            params: Parameters of each row.
            positions: Token position that each row's draw is for.
        """
        best = logits.argmax(dim=-1)
        # NaN counts as the largest value, so that the best logit shows it.
        is_finite = logits.gather(1, best[:, None])[:, 0].isfinite()
        drawn = [index for index, row in enumerate(params) if not row.is_greedy]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            uniform = [uniform_of(params[index].seed, positions[index]) for index in drawn]
            best[rows] = _draw(logits[rows].float(), [params[index] for index in drawn], uniform)
        return [
            token if is_valid else None
            for token, is_valid in zip(best.tolist(), is_finite.tolist(), strict=True)
        ]


def uniform_of(seed: int, position: int) -> float:
    """Return a number in [0, 1) that is fixed by ``seed`` and ``position``.

    Source: SplitMix64, Steele et al. 2014, "Fast splittable pseudorandom number generators".
    """
    return (_mix(_mix(seed) + position) >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]
) -> torch.Tensor:
    """Return one token per row. [num_rows], int64."""
    device = logits.device
    temperature = torch.tensor([row.temperature for row in params], device=device)
    logits = logits / temperature[:, None]
    top_k = [min(row.top_k, logits.shape[1]) or logits.shape[1] for row in params]
    if min(top_k) < logits.shape[1]:
        logits = _keep_top_k(logits, top_k)
    probabilities = torch.softmax(logits, dim=-1)
    top_p = torch.tensor([row.top_p for row in params], device=device)
    if bool((top_p < 1.0).any()):
        probabilities = _keep_top_p(probabilities, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    point = torch.tensor(uniform, dtype=torch.float32, device=device)[:, None] * total
    token = torch.searchsorted(cumulative, point, right=True)
    # Rounding may put the point on the total; the last token with any probability is meant then.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(token, last)[:, 0]


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Set all but the ``top_k`` largest logits of each row to minus infinity; ties stay."""
    vocab_size = logits.shape[1]
    width = max(k for k in top_k if k < vocab_size)
    largest = logits.topk(width, dim=-1).values
    index = torch.tensor([min(k, width) - 1 for k in top_k], device=logits.device)
    threshold = largest.gather(1, index[:, None])
    is_kept = torch.tensor([k >= vocab_size for k in top_k], device=logits.device)[:, None]
    return logits.masked_fill((logits < threshold) & ~is_kept, float("-inf"))


def _keep_top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set to 0 what is not in the smallest set of tokens whose mass reaches ``top_p``; ties stay.

    The set is looked for among the largest few; they are widened until every row has its set.
    """
    vocab_size = probabilities.shape[1]
    width = min(_FIRST_NUCLEUS, vocab_size)
    while True:
        largest = probabilities.topk(width, dim=-1).values
        mass = largest.cumsum(dim=-1)
        has_set = (mass[:, -1] >= top_p) | (top_p >= 1.0)
        if width == vocab_size or bool(has_set.all()):
            break
        width = min(width * _NUCLEUS_GROWTH, vocab_size)
    index = torch.searchsorted(mass, top_p[:, None]).clamp(max=width - 1)
    threshold = largest.gather(1, index)
    threshold = threshold.masked_fill(top_p[:, None] >= 1.0, 0.0)
    return probabilities.masked_fill(probabilities < threshold, 0.0)
