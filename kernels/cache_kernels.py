"""What kernels that read a paged KV cache where it lies can do, and by which rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """How a query attends to its context.

    Attributes:
        block_size: Tokens per block of the cache.
        scale: Factor of the products.
        window: Positions that a token sees, itself included; 0 is all.
        softcap: Bound of the scores; 0 is none.
    """

    block_size: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefillRule:
    """How scores of chunks of prompts are made.

    Attributes:
        block_size: Tokens per block of the cache.
        scale: Factor of the products.
        softcap: Bound of the scores; 0 is none.
    """

    block_size: int
    scale: float
    softcap: float = 0.0


class CacheKernels(Protocol):
    """Kernels that attend to a paged KV cache; all tensors lie on one device, that of the cache."""

    def paged_decode(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        contexts: tuple[torch.Tensor, torch.Tensor],
        rule: DecodeRule,
    ) -> torch.Tensor:
        """Attend with one query per sequence to its context.

        Args:
            query: [num_sequences, num_q_heads, head_dim], dtype of the cache.
            cached: Keys and values. [num_slots, num_kv_heads, head_dim].
            contexts: Block tables, [num_sequences, max_blocks], and context lengths, at least 1,
                [num_sequences]; int64, contiguous. The caller vouches for what they hold.
            rule: How scores are made.

        Returns:
            What each query attends to, as ``query``, contiguous.
        """
        ...

    def paged_prefill(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        contexts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rule: PrefillRule,
        output: torch.Tensor,
    ) -> None:
        """Attend with the rows of chunks of prompts to their contexts.

        Args:
            query: [num_rows, num_q_heads, head_dim], dtype of the cache.
            cached: As in ``paged_decode``.
            contexts: First row and number of rows of each chunk, [num_chunks, 2]; block tables,
                [num_chunks, max_blocks]; and the range of positions that each row sees, never
                empty, [num_rows, 2]; int64, contiguous. The caller vouches for what they hold.
            rule: How scores are made.
            output: Where what the rows of chunks attend to is put; other rows are left alone. As
                ``query``, contiguous.
        """
        ...
