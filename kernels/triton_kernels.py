"""The kernels for GPUs that attend to a paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.kernels.cache_kernels import DecodeRule
from chiasm.kernels.paged_decode_attention import paged_decode_attention
from chiasm.kernels.paged_prefill_attention import paged_prefill_attention

if TYPE_CHECKING:
    from chiasm.kernels.cache_kernels import PrefillRule

_PROBE_DIM = 16
_PROBE = DecodeRule(block_size=1, scale=1.0)


class TritonKernels:
    """Compiled on first use for each shape of heads; see ``CacheKernels``.

    Each launch is queued on the current stream, and nothing waits for it.
    """

    def check(self, device: torch.device) -> None:
        """Run the smallest launch on ``device``; raises whatever Triton raises if it cannot.

        Raises:
            RuntimeError: The result is wrong.
        """
        row = torch.ones(1, 1, _PROBE_DIM, device=device, dtype=torch.float16)
        tables = torch.zeros(1, 1, device=device, dtype=torch.int64)
        lengths = torch.ones(1, device=device, dtype=torch.int64)
        if not torch.equal(self.paged_decode(row, (row, row), (tables, lengths), _PROBE), row):
            raise RuntimeError("the first launch gave wrong numbers")

    def paged_decode(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        contexts: tuple[torch.Tensor, torch.Tensor],
        rule: DecodeRule,
    ) -> torch.Tensor:
        """See ``CacheKernels.paged_decode``."""
        return paged_decode_attention(_with_rows(query), cached, contexts, rule)

    def paged_prefill(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        contexts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rule: PrefillRule,
        output: torch.Tensor,
    ) -> None:
        """See ``CacheKernels.paged_prefill``."""
        paged_prefill_attention(_with_rows(query), cached, contexts, rule, output)


def _with_rows(query: torch.Tensor) -> torch.Tensor:
    """Return queries, each of which lies in one piece."""
    return query if query.stride(2) == 1 else query.contiguous()
