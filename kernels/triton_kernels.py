"""The kernels for GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.kernels.cache_kernels import DecodeRule
from chiasm.kernels.gated_activation import ACTIVATIONS, gated_activation
from chiasm.kernels.paged_decode_attention import paged_decode_attention
from chiasm.kernels.paged_prefill_attention import paged_prefill_attention
from chiasm.kernels.rms_norm import add_rms_norm
from chiasm.kernels.rope_store_kv import rope_store_kv
from chiasm.kernels.turn_pairs import turn_pairs

if TYPE_CHECKING:
    from chiasm.kernels.cache_kernels import PrefillRule

_PROBE_DIM = 16
_PROBE = DecodeRule(block_size=1, scale=1.0)


class TritonKernels:
    """Both ``CacheKernels`` and ``LayerKernels``, compiled on first use for each shape of heads.

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

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        addend: torch.Tensor | None,
        weight: torch.Tensor,
        epsilon: float,
        scale: float,
    ) -> torch.Tensor:
        """See ``LayerKernels.add_rms_norm``."""
        return add_rms_norm(hidden, addend, weight, epsilon, scale)

    def can_gate(self, activation: str) -> bool:
        """See ``LayerKernels.can_gate``."""
        return activation in ACTIVATIONS

    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """See ``LayerKernels.gate``."""
        return gated_activation(gate_up, activation)

    def rope_store(
        self,
        qkv: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        norm: tuple[torch.Tensor, float] | None,
    ) -> torch.Tensor:
        """See ``LayerKernels.rope_store``."""
        return rope_store_kv(qkv, tables, slots, cached, norm)

    def turn_pairs(self, heads: torch.Tensor, num_turned: int, rotation: torch.Tensor) -> None:
        """Turn the first heads of rows, in place; see ``kernels/turn_pairs.py``."""
        turn_pairs(heads, num_turned, rotation)


def _with_rows(query: torch.Tensor) -> torch.Tensor:
    """Return queries, each of which lies in one piece."""
    return query if query.stride(2) == 1 else query.contiguous()
