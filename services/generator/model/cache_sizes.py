"""Decide how large the KV cache is and which context it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiasm.generator.engine.block_group import GroupSize, count_most_blocks
from chiasm.generator.model.kv_cache import KVCacheLayout, count_token_bytes

if TYPE_CHECKING:
    import torch

    from chiasm.generator.model.model_spec import ModelSpec
    from chiasm.kernels.cpu.native import KernelChoice


class CacheTooSmallError(Exception):
    """The KV cache cannot hold what was asked for."""


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """How large the KV cache should be, and who reads it.

    Attributes:
        block_size: Tokens per block.
        budget_bytes: Bytes of the cache; ``None`` for what the device has; see
            ``memory_budget.py``.
        num_blocks: Blocks of each group of layers; overrides the budget unless ``None``.
        max_model_len: Context that it must hold; ``None`` for what model and cache allow.
        max_sequences: Sequences that hold blocks at once; more memory than they need is not
            reserved.
        chunk_tokens: Most tokens that a sequence grows by at one time.
        kernels: Which compiled kernels read it on a CPU.
        device_share: Share of a GPU's memory that may be used, by all processes together.
    """

    block_size: int
    budget_bytes: int | None
    num_blocks: int | None
    max_model_len: int | None
    max_sequences: int
    chunk_tokens: int
    kernels: KernelChoice = "auto"
    device_share: float = 0.8


def decide_sizes(
    spec: ModelSpec, dtype: torch.dtype, request: CacheRequest, budget_bytes: int
) -> tuple[KVCacheLayout, int]:
    """Return the layout of the cache and the context length that model and cache hold.

    Args:
        spec: Facts about the model.
        dtype: Element type of the cache.
        request: What is asked for.
        budget_bytes: Bytes that the cache may take.

    Raises:
        CacheTooSmallError: ``max_model_len`` is over either.
    """
    # A picture whose rows attend to one another is never cut.
    request = replace(request, chunk_tokens=max(request.chunk_tokens, spec.group_tokens))
    most = min(spec.max_positions, request.max_model_len or spec.max_positions)
    counts = _count_blocks(spec, dtype, request, (budget_bytes, most))
    capacities = (
        _count_tokens(count, group.window, request)
        for count, group in zip(counts, spec.cache_groups, strict=True)
    )
    capacity = min(
        spec.max_positions, *(tokens for tokens in capacities if tokens is not None), most
    )
    if capacity < (request.max_model_len or 2):
        bound = f" ({spec.positions_bound})" if spec.positions_bound else ""
        raise CacheTooSmallError(
            f"A context of {request.max_model_len or 2} tokens is asked for, but the model takes"
            f" {spec.max_positions}{bound} and a KV cache of {' and '.join(map(str, counts))} "
            f"blocks of {request.block_size} tokens holds {capacity}."
        )
    sizes = tuple(
        GroupSize(count, group.window)
        for count, group in zip(counts, spec.cache_groups, strict=True)
    )
    return KVCacheLayout(sizes, request.block_size), capacity


def _count_blocks(
    spec: ModelSpec, dtype: torch.dtype, request: CacheRequest, bounds: tuple[int, int]
) -> list[int]:
    """Return the blocks of each group; ``bounds`` are those of bytes and of a context's tokens."""
    groups = spec.cache_groups
    budget_bytes, most = bounds
    if request.num_blocks is not None:
        return [request.num_blocks] * len(groups)
    size = request.block_size
    block_bytes = [size * count_token_bytes(spec, group, dtype) for group in groups]
    # What one sequence of the longest context takes; the budget is shared out in this proportion.
    needs = [count_most_blocks(most, request.chunk_tokens, group.window, size) for group in groups]
    whole = sum(need * each for need, each in zip(needs, block_bytes, strict=True))
    if budget_bytes < whole:
        return [budget_bytes // sum(block_bytes)] * len(groups)
    return [need * min(budget_bytes, request.max_sequences * whole) // whole for need in needs]


def _count_tokens(num_blocks: int, window: int, request: CacheRequest) -> int | None:
    """Return the tokens of one sequence that a group holds; ``None`` for any number."""
    size = request.block_size
    in_window = -(-(window + request.chunk_tokens) // size) + 1
    return None if window and num_blocks >= in_window else num_blocks * size
