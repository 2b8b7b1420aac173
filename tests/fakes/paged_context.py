"""Paged keys and values for kernel tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.kernels.paged_reference import slots_of

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        slots = slots_of(table, (first, end), block_size)
        for tensor in (keys, values):
            tensor[slots] = torch.randn(len(slots), *heads, generator=generator).to(dtype)
        table[: first // block_size] = -1
    return tables, keys, values
