"""Hold keys and values of all live sequences in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.generator.model.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """Sizes of a KV cache; ``count_blocks`` derives ``num_blocks`` from a budget of bytes."""

    num_blocks: int
    block_size: int

    @property
    def num_slots(self) -> int:
        """Token positions of the whole cache."""
        return self.num_blocks * self.block_size


class KVCache:
    """Keys and values per layer, one row per slot.

    ::

        keys[layer], values[layer]     [num_slots, num_kv_heads, head_dim]
        slot = block_id * block_size + offset

        block       0               1               2
        slot    0  1  2  3  |   4  5  6  7  |   8  9 10 11      block_size 4

    Memory is reserved at construction and touched when a slot is first written. A slot is read
    only after its owner has written it.
    """

    def __init__(
        self, spec: ModelSpec, layout: KVCacheLayout, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layout.num_slots, spec.num_kv_heads, spec.head_dim)
        self.layout = layout
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]

    def store(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write one layer's new keys and values.

        Args:
            layer: Index of the layer.
            slots: Slot of every token, each once. [num_tokens], int64.
            key: New keys. [num_tokens, num_kv_heads, head_dim], dtype of the cache.
            value: New values, as ``key``.
        """
        self.keys[layer][slots] = key
        self.values[layer][slots] = value

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values of all layers between blocks: pairs of from and to.

        All sources are read before anything is written.
        """
        size = self.layout.block_size
        offsets = torch.arange(size, device=self.keys[0].device)
        pairs = torch.tensor(copies, device=offsets.device)
        sources, targets = ((pairs[:, i, None] * size + offsets).flatten() for i in range(2))
        for tensor in (*self.keys, *self.values):
            tensor[targets] = tensor[sources]


def count_blocks(spec: ModelSpec, dtype: torch.dtype, block_size: int, budget_bytes: int) -> int:
    """Return how many blocks of ``block_size`` tokens ``budget_bytes`` hold; 0 if not one."""
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    return budget_bytes // (token_bytes * block_size)
