"""Compute what lies between the matrix products of a layer with our kernels for CPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from chiasm.generator.model.fused.torch_operators import TorchOperators
from chiasm.kernels.cpu.elementwise import ACTIVATIONS, GateRule, NormRule, RopeRule

if TYPE_CHECKING:
    import torch

    from chiasm.common.rms_norm import RMSNorm
    from chiasm.generator.model.fused.description import DecoderDescription
    from chiasm.generator.model.fused.layer_operators import AddNorm, Gate, Heads, Place
    from chiasm.generator.model.fused.rotary import Rotation
    from chiasm.generator.model.kv_cache import KVCache
    from chiasm.kernels.cpu.native import CpuKernels


class KernelOperators:
    """The operators of layers, each one call; see ``LayerOperators``.

    They round where torch's operators round.
    """

    def __init__(
        self, description: DecoderDescription, cache: KVCache, kernels: CpuKernels
    ) -> None:
        """Prepare the operators of the model that ``description`` tells of."""
        self._description = description
        self._cache = cache
        self._kernels = kernels.elementwise
        self._dtype = cache.keys[0].dtype

    def add_norm(self, norm: RMSNorm, scale: float) -> AddNorm:
        """See ``LayerOperators.add_norm``."""
        rule = NormRule(norm.weight, norm.epsilon, self._dtype, scale)
        return partial(self._kernels.add_rms_norm, rule)

    def gate(self, width: int) -> Gate:
        """See ``LayerOperators.gate``; torch computes functions that have no kernel."""
        activation = self._description.activation
        if activation not in ACTIVATIONS:
            return TorchOperators(self._description, self._cache).gate(width)
        return partial(self._kernels.gate, GateRule(activation, width, self._dtype))

    def place(self, layer: int, qk_norm: RMSNorm | None) -> Place:
        """See ``LayerOperators.place``."""
        heads = (
            self._description.num_q_heads,
            self._description.num_kv_heads,
            self._description.head_dim,
        )
        norm = None if qk_norm is None else (qk_norm.weight, qk_norm.epsilon)
        rule = RopeRule(heads, self._dtype, norm)
        cached = (self._cache.keys[layer], self._cache.values[layer])
        rope_store, (num_q_heads, num_kv_heads, head_dim) = self._kernels.rope_store, heads
        num_turned_heads = num_q_heads + num_kv_heads
        shape = (-1, num_turned_heads + num_kv_heads, head_dim)

        def place(qkv: torch.Tensor, rotation: Rotation, slots: torch.Tensor) -> Heads:
            rope_store(rule, qkv, (rotation.cos, rotation.sin), slots, cached)
            placed = qkv.view(shape)
            query, key = placed[:, :num_q_heads], placed[:, num_q_heads:num_turned_heads]
            return query, key, placed[:, num_turned_heads:]

        return place
