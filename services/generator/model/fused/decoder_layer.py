"""Compute one layer of the fused decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.activations import ACT2FN

from chiasm.generator.model.attention import ScoreRule, attend
from chiasm.generator.model.fused.rotary import rotate

if TYPE_CHECKING:
    from chiasm.generator.model.attention import AttentionContext
    from chiasm.generator.model.fused.description import DecoderDescription
    from chiasm.generator.model.fused.layer_weights import LayerWeights
    from chiasm.generator.model.fused.rotary import Rotation


class DecoderLayer:
    """An attention block and a gated feed-forward block, each added to what it reads."""

    def __init__(self, index: int, description: DecoderDescription, weights: LayerWeights) -> None:
        """Prepare layer ``index`` of the model that ``description`` tells of."""
        layer = description.layers[index]
        self.rotary_type = layer.rotary_type
        self._index = index
        self._weights = weights
        self._rule = ScoreRule(
            description.attention_scale, layer.window, description.attention_softcap
        )
        self._activation = ACT2FN[description.activation]
        self._residual_scale = description.residual_scale
        self._num_q_heads = description.num_q_heads
        self._num_turned_heads = description.num_q_heads + description.num_kv_heads
        self._head_dim = description.head_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self._weights.num_bytes

    def forward(
        self, hidden: torch.Tensor, rotation: Rotation, context: AttentionContext
    ) -> torch.Tensor:
        """Compute the layer and write its keys and values into the cache.

        Args:
            hidden: [num_tokens, hidden_size], dtype of the model.
            rotation: Angles of the layer's rotary type.
            context: Batch and cache of this forward.

        Returns:
            The hidden states behind the layer, as ``hidden``.
        """
        attended = self._attend(hidden, rotation, context)
        hidden = torch.add(hidden, attended, alpha=self._residual_scale)
        return torch.add(hidden, self._feed_forward(hidden), alpha=self._residual_scale)

    def _attend(
        self, hidden: torch.Tensor, rotation: Rotation, context: AttentionContext
    ) -> torch.Tensor:
        weights, num_tokens = self._weights, len(hidden)
        heads = weights.qkv(weights.attention_norm(hidden)).view(num_tokens, -1, self._head_dim)
        turned, value = heads[:, : self._num_turned_heads], heads[:, self._num_turned_heads :]
        if weights.qk_norm is not None:
            turned = weights.qk_norm(turned)
        turned = rotate(turned, rotation)
        query, key = turned[:, : self._num_q_heads], turned[:, self._num_q_heads :]
        attended = attend(context, self._index, (query, key, value), self._rule)
        output = weights.output(attended.reshape(num_tokens, -1))
        if weights.post_attention_norm is not None:
            output = weights.post_attention_norm(output)
        return output

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = self._weights
        gate, up = weights.gate_up(weights.mlp_norm(hidden)).chunk(2, dim=-1)
        output = weights.down(self._activation(gate).mul_(up))
        if weights.post_mlp_norm is not None:
            output = weights.post_mlp_norm(output)
        return output
