"""Paged keys and values for kernel tests, and attention to them in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.kernels.cpu.native import DecodeRule, PrefillRule


def _slots_of(table: torch.Tensor, positions: tuple[int, int], block_size: int) -> torch.Tensor:
    """Return the slots of positions, from the first to before the last; int64."""
    offsets = torch.arange(*positions)
    return table[offsets // block_size] * block_size + offsets % block_size


def make_paged_context(
    positions: Sequence[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return block tables of sequences, and keys and values; what no sequence sees is NaN.

    Args:
        positions: The first position that each sequence sees and the one behind its last.
        heads: Key heads and their width.
        block_size: Tokens per block.
        dtype: Of keys and values.
        generator: Source of all numbers.
    """
    max_blocks = -(-max(end for _, end in positions) // block_size)
    num_blocks = len(positions) * max_blocks
    tables = torch.randperm(num_blocks, generator=generator).view(len(positions), max_blocks)
    shape = (num_blocks * block_size, *heads)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    for table, (first, end) in zip(tables, positions, strict=True):
        slots = _slots_of(table, (first, end), block_size)
        for tensor in (keys, values):
            tensor[slots] = torch.randn(len(slots), *heads, generator=generator).to(dtype)
        table[: first // block_size] = -1
    return tables, keys, values


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
    slots = _slots_of(table, (first, end), rule.block_size)
    repeats = query.shape[1] // cached[0].shape[1]
    key, value = (tensor[slots].double().repeat_interleave(repeats, 1) for tensor in cached)
    scores = torch.einsum("qhd,thd->hqt", query.double(), key) * rule.scale
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    positions = torch.arange(first, end)
    hidden = (positions < seen[:, :1]) | (positions >= seen[:, 1:])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqt,thd->qhd", weights, value)
