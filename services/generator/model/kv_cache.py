"""Hold keys and values of all live sequences in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chiasm.generator.engine.block_group import GroupSize
    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.model.model_spec import CacheGroup, ModelSpec
    from chiasm.kernels.cache_kernels import CacheKernels


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """Sizes of a KV cache.

    Attributes:
        sizes: Blocks of each of the model's cache groups, in their order.
        block_size: Token positions of a block.
    """

    sizes: tuple[GroupSize, ...]
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups."""
        return sum(size.num_blocks for size in self.sizes)


class KVCache:
    """Keys and values per layer, one row per slot of the layer's group.

    ::

        keys[layer], values[layer]     [num_slots, num_kv_heads, head_dim]
        slot = block_id * block_size + offset

        block       0               1               2
        slot    0  1  2  3  |   4  5  6  7  |   8  9 10 11      block_size 4

    Memory is reserved at construction and touched when a slot is first written. A slot is read
    only after its owner has written it.

    Attributes:
        layout: Its sizes.
        groups: Layers that keep the same positions.
        group_of: Index of each layer's group.
        keys: Keys of each layer.
        values: Values of each layer.
        kernels: What reads it where it lies; ``None`` for torch, which gathers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: KVCacheLayout,
        dtype: torch.dtype,
        device: torch.device,
        kernels: CacheKernels | None = None,
    ) -> None:
        self.layout = layout
        self.kernels = kernels
        self.groups: tuple[CacheGroup, ...] = spec.cache_groups
        self.group_of = [0] * spec.num_layers
        for index, group in enumerate(self.groups):
            for layer in group.layers:
                self.group_of[layer] = index
        slots = [layout.sizes[group].num_blocks * layout.block_size for group in self.group_of]
        rows = (spec.num_kv_heads, spec.head_dim)
        self.keys = [torch.empty((num, *rows), dtype=dtype, device=device) for num in slots]
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

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy keys and values between blocks.

        All sources are read before anything is written.
        """
        for index, group in enumerate(self.groups):
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == index]
            if pairs:
                self._copy(group, pairs)

    def _copy(self, group: CacheGroup, pairs: list[tuple[int, int]]) -> None:
        size = self.layout.block_size
        offsets = torch.arange(size, device=self.keys[0].device)
        blocks = torch.tensor(pairs, device=offsets.device)
        sources, targets = ((blocks[:, i, None] * size + offsets).flatten() for i in range(2))
        for layer in group.layers:
            for tensor in (self.keys[layer], self.values[layer]):
                tensor[targets] = tensor[sources]


def count_token_bytes(spec: ModelSpec, group: CacheGroup, dtype: torch.dtype) -> int:
    """Return the bytes that one token takes in all layers of ``group``."""
    return 2 * len(group.layers) * spec.num_kv_heads * spec.head_dim * dtype.itemsize
