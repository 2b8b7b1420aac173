"""Choose the next token of every sequence of a step at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from chiasm.common.device import send
from chiasm.generator.engine.logit_rules import apply_rules
from chiasm.generator.engine.logprobs import compute_logprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.generator.engine.logprobs import TokenLogprobs
    from chiasm.generator.engine.sampling_params import SamplingParams
    from chiasm.generator.engine.sampling_state import SamplingState

_FIRST_NUCLEUS = 64
_NUCLEUS_GROWTH = 8
_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A sequence that samples in a step.

    Attributes:
        params: How.
        position: Token position that the draw is for.
        state: Its tokens so far; ``None`` if no rule depends on them.
    """

    params: SamplingParams
    position: int
    state: SamplingState | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What was chosen, and how likely it was if that was asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Greedy and sampled choice, batched; no vocabulary is ever sorted whole unless it must be.

    A draw depends on nothing but the row's logits, its parameters, its tokens, its seed and its
    position: the uniform number is a hash of seed and position, and the token is found by inverting
    the cumulative distribution in the order of token ids. The batch around a row does not matter.
    """

    def sample(self, logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[SampledToken | None]:
        """Choose the next tokens and tell them; see ``choose`` and ``tell``."""
        return self.tell(self.choose(logits, rows), logits, rows)

    def needs_host(self, rows: Sequence[SampledRow]) -> bool:
        """Return whether tokens must be told before those of the next step are chosen."""
        return any(row.state or row.params.num_logprobs is not None for row in rows)

    def choose(self, logits: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
        """Choose the next token of each row, on the device, if possible without waiting for it.

        Args:
            logits: [num_rows, vocab_size], any float type.
            rows: One per row.

        Returns:
            The tokens, each one of the vocabulary, and 1 where the logits were finite, else 0.
            [2, num_rows], int64.
        """
        # Not argmax, which takes four times as long on a CPU. NaN counts as the largest value, so
        # that the best logit shows it.
        highest, best = logits.max(dim=-1)
        # The best token of the model is all that the others need.
        special = [index for index, row in enumerate(rows) if row.state or not row.params.is_greedy]
        if special:
            index = _send(special, logits.device)
            best[index] = _choose(logits[index].float(), [rows[one] for one in special])
        is_finite = highest.isfinite()
        # What is drawn without probabilities lies behind the vocabulary, and the next step may look
        # it up before its sequence has ended.
        return torch.stack((best.masked_fill_(~is_finite, 0), is_finite.long()))

    def tell(
        self, chosen: torch.Tensor, logits: torch.Tensor, rows: Sequence[SampledRow]
    ) -> list[SampledToken | None]:
        """Return what was chosen; ``None`` where the logits are not finite.

        The states of the rows are advanced by their tokens.

        Args:
            chosen: What ``choose`` has returned, or a copy.
            logits: As they were given to it.
            rows: As above.
        """
        tokens, is_finite = chosen.tolist()
        for row, token in zip(rows, tokens, strict=True):
            if row.state is not None:
                row.state.advance(token)
        logprobs = _tell_logprobs(logits, rows, tokens)
        return [
            SampledToken(token, logprobs.get(index)) if is_finite[index] else None
            for index, token in enumerate(tokens)
        ]


def _tell_logprobs(
    logits: torch.Tensor, rows: Sequence[SampledRow], tokens: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """Return the log probabilities of the rows that ask for them, by row."""
    wishes = {
        index: row.params.num_logprobs
        for index, row in enumerate(rows)
        if row.params.num_logprobs is not None
    }
    if not wishes:
        return {}
    asking = list(wishes)
    asked = logits[torch.tensor(asking, device=logits.device)]
    told = compute_logprobs(asked, [tokens[index] for index in asking], list(wishes.values()))
    return dict(zip(asking, told, strict=True))


def _choose(logits: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
    """Return one token per row, whose logits are changed in place. [num_rows], int64."""
    ruled = [index for index, row in enumerate(rows) if row.state is not None]
    if ruled:
        index = _send(ruled, logits.device)
        states = [state for row in rows if (state := row.state) is not None]
        logits[index] = apply_rules(logits[index], states)
    tokens = logits.max(dim=-1).indices
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        index = _send(drawn, logits.device)
        params = [rows[one].params for one in drawn]
        uniform = [uniform_of(rows[one].params.seed, rows[one].position) for one in drawn]
        tokens[index] = _draw(logits[index], params, uniform)
    return tokens


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
    """Return one token per row, whose best logit is finite. [num_rows], int64."""
    device = logits.device
    temperature = _send([row.temperature for row in params], device)
    # From the best one on, so that no temperature makes it infinite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    top_k = [min(row.top_k, logits.shape[1]) or logits.shape[1] for row in params]
    if min(top_k) < logits.shape[1]:
        logits = _keep_top_k(logits, top_k)
    probabilities = torch.softmax(logits, dim=-1)
    # Asked of the parameters: asking a tensor would make the host wait for the device.
    if any(row.min_p > 0.0 for row in params):
        min_p = _send([row.min_p for row in params], device)
        least = min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        mass = probabilities.sum(dim=-1, keepdim=True)
        probabilities /= torch.where(min_p[:, None] > 0.0, mass, 1.0)
    if any(row.top_p < 1.0 for row in params):
        top_p = _send([row.top_p for row in params], device)
        most = max(k for k, row in zip(top_k, params, strict=True) if row.top_p < 1.0)
        probabilities = _keep_top_p(probabilities, top_p, most)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    point = _send(uniform, device)[:, None] * total
    token = torch.searchsorted(cumulative, point, right=True)
    # Rounding may put the point on the total; the last token with any probability is meant then.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(token, last)[:, 0]


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Set all but the ``top_k`` largest logits of each row to minus infinity; ties stay."""
    vocab_size = logits.shape[1]
    width = max(k for k in top_k if k < vocab_size)
    largest = logits.topk(width, dim=-1).values
    index = _send([min(k, width) - 1 for k in top_k], logits.device)
    threshold = largest.gather(1, index[:, None])
    is_kept = _send([k >= vocab_size for k in top_k], logits.device)[:, None]
    return logits.masked_fill((logits < threshold) & ~is_kept, float("-inf"))


def _keep_top_p(probabilities: torch.Tensor, top_p: torch.Tensor, most: int) -> torch.Tensor:
    """Set to 0 what is not in the smallest set of tokens whose mass reaches ``top_p``; ties stay.

    The set is looked for among the largest few; they are widened until every row has its set.

    Args:
        probabilities: [num_rows, vocab_size], float32.
        top_p: [num_rows], float32.
        most: Tokens that have a probability in a row that looks for its set; ties with the least
            likely of them do not count.
    """
    vocab_size = probabilities.shape[1]
    width = min(_FIRST_NUCLEUS, vocab_size)
    while True:
        largest = probabilities.topk(width, dim=-1).values
        mass = largest.cumsum(dim=-1)
        # Asking the tensor makes the host wait for the device.
        if width >= most or bool(((mass[:, -1] >= top_p) | (top_p >= 1.0)).all()):
            break
        width = min(width * _NUCLEUS_GROWTH, vocab_size)
    index = torch.searchsorted(mass, top_p[:, None]).clamp(max=width - 1)
    threshold = largest.gather(1, index)
    threshold = threshold.masked_fill(top_p[:, None] >= 1.0, 0.0)
    return probabilities.masked_fill(probabilities < threshold, 0.0)


def _send(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Return numbers on the device, fractions as float32."""
    array = np.array(values)
    return send(array.astype(np.float32) if array.dtype == np.float64 else array, device)
