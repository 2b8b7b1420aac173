"""Attend to one sequence of a paged KV cache in float64: what all kernels are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from chiasm.kernels.cache_kernels import DecodeRule, PrefillRule


def attend_exactly(
    query: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    seen: torch.Tensor,
    rule: DecodeRule | PrefillRule,
) -> torch.Tensor:
    """Attend with the rows of one sequence; float64, [num_rows, num_q_heads, head_dim].

    Args:
        query: [num_rows, num_q_heads, head_dim].
        cached: Keys and values. [num_slots, num_kv_heads, head_dim].
        table: Blocks of the sequence. [num_blocks], int64.
        seen: Positions that each row sees, the first and the one behind the last. [num_rows, 2].
        rule: How scores are made.
    """
    first, end = int(seen[:, 0].min()), int(seen[:, 1].max())
    slots = slots_of(table, (first, end), rule.block_size)
    repeats = query.shape[1] // cached[0].shape[1]
    key, value = (tensor[slots].double().repeat_interleave(repeats, 1) for tensor in cached)
    scores = torch.einsum("qhd,thd->hqt", query.double(), key) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    positions = torch.arange(first, end, device=seen.device)
    hidden = (positions < seen[:, :1]) | (positions >= seen[:, 1:])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqt,thd->qhd", weights, value)


def slots_of(table: torch.Tensor, positions: tuple[int, int], block_size: int) -> torch.Tensor:
    """Return the slots of positions, from the first to before the last; int64."""
    offsets = torch.arange(*positions, device=table.device)
    return table[offsets // block_size] * block_size + offsets % block_size
