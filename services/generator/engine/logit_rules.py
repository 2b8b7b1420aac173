"""Change logits before a token is chosen: masks, bias and penalties, all rows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chiasm.generator.engine.sampling_state import SamplingState

    WeightedEntry = tuple[int, int, float]

_FINITE = torch.finfo(torch.float32)


def apply_rules(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Apply allowed tokens, bad words, minimum length, grammar, bias and penalties, in this order.

    A row that the masks leave without a token keeps those that its grammar allows.

    Args:
        logits: Rows with rules; changed in place. [num_rows, vocab_size], float32.
        states: One per row.

    Returns:
        ``logits``; the best of each row is finite.

    Source: the order of vLLM's sampler; penalties of Keskar et al. 2019 (repetition) and of the
    OpenAI interface (presence, frequency).
    """
    _mask(logits, states)
    biases = [
        (row, token, bias)
        for row, state in enumerate(states)
        for token, bias in state.params.logit_bias.items()
    ]
    if biases:
        rows, tokens, values = _to_tensors(biases, logits.device)
        logits[rows, tokens] += values
    _penalise(logits, states)
    return logits


def _mask(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    is_hidden = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for row, state in enumerate(states):
        if len(state.allowed_token_ids):
            is_hidden[row] = True
            is_hidden[row, state.allowed_token_ids.to(logits.device)] = False
        bad_tokens = state.find_bad_tokens()
        if state.may_not_stop:
            bad_tokens += state.params.stop_token_ids
        if bad_tokens:
            is_hidden[row, bad_tokens] = True
    is_wrong = _find_wrong(logits, states)
    is_hidden |= is_wrong
    is_hidden = torch.where(is_hidden.all(dim=1, keepdim=True), is_wrong, is_hidden)
    logits.masked_fill_(is_hidden, float("-inf"))


def _find_wrong(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Return which tokens the grammars rule out. [num_rows, vocab_size], bool."""
    is_wrong = torch.zeros(logits.shape, dtype=torch.bool)
    for row, state in enumerate(states):
        allowed = state.grammar.find_allowed(logits.shape[1]) if state.grammar else None
        if allowed is not None:
            is_wrong[row] = torch.from_numpy(~allowed)
    return is_wrong.to(logits.device)


def _penalise(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    for row, state in enumerate(states):
        penalty = state.params.repetition_penalty
        if penalty != 1.0:
            tokens = state.seen_token_ids.to(logits.device)
            found = logits[row, tokens]
            scaled = torch.where(found > 0, found / penalty, found * penalty)
            # No penalty makes a token certain, or hides one: a row without a finite best logit has
            # no probabilities. What is hidden stays so.
            scaled = scaled.clamp(_FINITE.min, _FINITE.max)
            logits[row, tokens] = torch.where(found.isfinite(), scaled, found)
    counted = [
        (row, token, state.params.presence_penalty + state.params.frequency_penalty * count)
        for row, state in enumerate(states)
        for token, count in state.output_counts.items()
    ]
    if counted:
        rows, tokens, values = _to_tensors(counted, logits.device)
        logits[rows, tokens] -= values


def _to_tensors(
    entries: Iterable[WeightedEntry], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, tokens, values = zip(*entries, strict=True)
    return (
        torch.tensor(rows, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )
