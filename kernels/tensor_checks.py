"""Check that queries and a paged KV cache fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_fit(query: torch.Tensor, cached: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Check shapes, dtypes and strides of queries, keys and values.

    Args:
        query: [num_rows, num_q_heads, head_dim].
        cached: Keys and values. [num_slots, num_kv_heads, head_dim].

    Raises:
        ValueError: They do not fit together.
    """
    keys, values = cached
    if keys.shape != values.shape or keys.stride() != values.stride():
        raise ValueError(f"Keys are {tuple(keys.shape)}, but values {tuple(values.shape)}.")
    if query.shape[1] % keys.shape[1] or query.shape[2] != keys.shape[2]:
        raise ValueError(f"Queries are {tuple(query.shape)}, but keys {tuple(keys.shape)}.")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"Queries are {query.dtype}, but keys {keys.dtype}.")
    if query.stride(2) != 1 or keys.stride(2) != 1:
        raise ValueError(f"Elements lie {query.stride(2)} and {keys.stride(2)} apart, not 1.")
