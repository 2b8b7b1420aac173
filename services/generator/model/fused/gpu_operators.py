"""Compute what lies between the matrix products of a layer with our kernels for GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.generator.model.fused.torch_operators import TorchOperators

if TYPE_CHECKING:
    import torch

    from chiasm.common.rms_norm import RMSNorm
    from chiasm.generator.model.fused.description import DecoderDescription
    from chiasm.generator.model.fused.layer_operators import AddNorm, Gate, Heads, Place
    from chiasm.generator.model.fused.rotary import Rotation
    from chiasm.generator.model.kv_cache import KVCache
    from chiasm.kernels.layer_kernels import LayerKernels


class GpuOperators:
    """The operators of layers, each one launch; see ``LayerOperators``.

    They round where torch's operators round.
    """

    def __init__(
        self, description: DecoderDescription, cache: KVCache, kernels: LayerKernels
    ) -> None:
        """Prepare the operators of the model that ``description`` tells of."""
        self._description = description
        self._cache = cache
        self._kernels = kernels

    def add_norm(self, norm: RMSNorm, scale: float) -> AddNorm:
        """See ``LayerOperators.add_norm``."""
        kernels, weight, epsilon = self._kernels, norm.weight.contiguous(), norm.epsilon

        def add_norm(hidden: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
            return kernels.add_rms_norm(hidden, addend, weight, epsilon, scale)

        return add_norm

    def gate(self, width: int) -> Gate:
        """See ``LayerOperators.gate``; torch computes functions that have no kernel."""
        kernels, activation = self._kernels, self._description.activation
        if not kernels.can_gate(activation):
            return TorchOperators(self._description, self._cache).gate(width)
        return lambda gate_up: kernels.gate(gate_up, activation)

    def place(self, layer: int, qk_norm: RMSNorm | None) -> Place:
        """See ``LayerOperators.place``."""
        kernels, num_q_heads = self._kernels, self._description.num_q_heads
        num_turned_heads = num_q_heads + self._description.num_kv_heads
        head_dim = self._description.head_dim
        norm = None if qk_norm is None else (qk_norm.weight.contiguous(), qk_norm.epsilon)
        cached = (self._cache.keys[layer], self._cache.values[layer])

        def place(qkv: torch.Tensor, rotation: Rotation, slots: torch.Tensor) -> Heads:
            tables = (rotation.cos, rotation.sin)
            turned = kernels.rope_store(qkv, tables, slots, cached, norm)
            value = qkv.view(len(qkv), -1, head_dim)[:, num_turned_heads:]
            return turned[:, :num_q_heads], turned[:, num_q_heads:], value

        return place
