"""Compute what lies between the matrix products of a layer with torch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.activations import ACT2FN

from chiasm.generator.model.fused.rotary import rotate

if TYPE_CHECKING:
    import torch

    from chiasm.common.rms_norm import RMSNorm
    from chiasm.generator.model.fused.description import DecoderDescription
    from chiasm.generator.model.fused.layer_operators import AddNorm, Gate, Heads, Place
    from chiasm.generator.model.fused.rotary import Rotation
    from chiasm.generator.model.kv_cache import KVCache


class TorchOperators:
    """The operators of layers, each some operators of torch; see ``LayerOperators``."""

    def __init__(self, description: DecoderDescription, cache: KVCache) -> None:
        """Prepare the operators of the model that ``description`` tells of."""
        self._description = description
        self._cache = cache

    def add_norm(self, norm: RMSNorm, scale: float) -> AddNorm:
        """See ``LayerOperators.add_norm``."""

        def add_norm(hidden: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
            if addend is not None:
                hidden.add_(addend, alpha=scale)
            return norm(hidden)

        return add_norm

    def gate(self, width: int) -> Gate:
        """See ``LayerOperators.gate``."""
        activation = ACT2FN[self._description.activation]

        def gate(gate_up: torch.Tensor) -> torch.Tensor:
            gates, ups = gate_up[:, :width], gate_up[:, width:]
            gated: torch.Tensor = activation(gates)
            return gated.mul_(ups)

        return gate

    def place(self, layer: int, qk_norm: RMSNorm | None) -> Place:
        """See ``LayerOperators.place``."""
        num_q_heads = self._description.num_q_heads
        num_turned_heads = num_q_heads + self._description.num_kv_heads
        head_dim, cache = self._description.head_dim, self._cache

        def place(qkv: torch.Tensor, rotation: Rotation, slots: torch.Tensor) -> Heads:
            heads = qkv.view(len(qkv), -1, head_dim)
            turned, value = heads[:, :num_turned_heads], heads[:, num_turned_heads:]
            if qk_norm is not None:
                turned = qk_norm(turned)
            turned = rotate(turned, rotation)
            query, key = turned[:, :num_q_heads], turned[:, num_q_heads:]
            cache.store(layer, slots, key, value)
            return query, key, value

        return place
