"""Compute one layer of the fused decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.generator.model.attention import ScoreRule, attend_to_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from chiasm.common.rms_norm import RMSNorm
    from chiasm.generator.model.attention import AttentionContext
    from chiasm.generator.model.fused.description import DecoderDescription
    from chiasm.generator.model.fused.layer_operators import LayerOperators
    from chiasm.generator.model.fused.layer_weights import LayerWeights
    from chiasm.generator.model.fused.rotary import Rotation

    Norm = Callable[[torch.Tensor], torch.Tensor]


class DecoderLayer:
    """An attention block and a gated feed-forward block, each added to what it reads."""

    def __init__(
        self,
        index: int,
        description: DecoderDescription,
        weights: LayerWeights,
        operators: LayerOperators,
    ) -> None:
        """Prepare layer ``index`` of the model that ``description`` tells of."""
        layer, scale = description.layers[index], description.residual_scale
        self.rotary_type = layer.rotary_type
        self._index = index
        self._weights = weights
        self._rule = ScoreRule(
            description.attention_scale, layer.window, description.attention_softcap
        )
        self._attention_norm = operators.add_norm(weights.attention_norm, scale)
        self._mlp_norm = operators.add_norm(weights.mlp_norm, scale)
        self._post_attention_norm = _make_norm(weights.post_attention_norm, operators)
        self._post_mlp_norm = _make_norm(weights.post_mlp_norm, operators)
        self._place = operators.place(index, weights.qk_norm)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self._weights.num_bytes

    def forward(
        self,
        hidden: torch.Tensor,
        addend: torch.Tensor | None,
        rotation: Rotation,
        context: AttentionContext,
    ) -> torch.Tensor:
        """Compute the layer and write its keys and values into the cache.

        Args:
            hidden: [num_tokens, hidden_size], dtype of the model; what this adds is added in place.
            addend: What the layer before has left to add, as ``hidden``; ``None`` for nothing.
            rotation: Angles of the layer's rotary type.
            context: Batch and cache of this forward.

        Returns:
            What is left to add to the hidden states, as ``hidden``.
        """
        attended = self._attend(self._attention_norm(hidden, addend), rotation, context)
        return self._feed_forward(self._mlp_norm(hidden, attended))

    def _attend(
        self, normed: torch.Tensor, rotation: Rotation, context: AttentionContext
    ) -> torch.Tensor:
        slots = context.slots_of(self._index)
        heads = self._place(self._weights.qkv(normed), rotation, slots)
        attended = attend_to_cache(context, self._index, heads, self._rule)
        output = self._weights.output(attended.flatten(1))
        return self._post_attention_norm(output)

    def _feed_forward(self, normed: torch.Tensor) -> torch.Tensor:
        output = self._weights.down(self._weights.gate_up(normed))
        return self._post_mlp_norm(output)


def _make_norm(norm: RMSNorm | None, operators: LayerOperators) -> Norm:
    """Return what norms what a block adds; without a norm, what leaves it as it is."""
    if norm is None:
        return lambda output: output
    add_norm = operators.add_norm(norm, 1.0)
    return lambda output: add_norm(output, None)
