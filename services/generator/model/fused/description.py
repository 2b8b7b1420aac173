"""Describe a text model of the Llama class: all that its forward depends on besides the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers


class UnsupportedDecoderError(Exception):
    """The fused decoder does not compute models of this kind; the message says why."""


@dataclass(frozen=True, slots=True)
class LayerDescription:
    """In what layers of one model differ.

    Attributes:
        window: Positions that a token sees, itself included; 0 is all before it.
        rotary_type: Name by which the rotary module tells its frequencies apart; empty if all
            layers have the same.
    """

    window: int = 0
    rotary_type: str = ""


@dataclass(frozen=True, slots=True)
class DecoderDescription:
    """What a text model computes; the forward reads this and nothing else of the configuration.

    Attributes:
        num_q_heads: Query heads.
        num_kv_heads: Key heads.
        head_dim: Width of a head.
        layers: Layers, first to last.
        norm_epsilon: Added to the mean square in every norm.
        activation: Name of the gate's function, as transformers spells it.
        attention_scale: Factor of the scores.
        attention_softcap: Bound of the scores; 0 is none.
        embedding_scale: Factor of all rows that enter, media included.
        residual_scale: Factor of what attention and feed-forward blocks add.
        has_qk_norm: Whether each head of queries and keys is normed before it is turned.
        has_post_norms: Whether what the blocks add is normed.
        has_offset_norms: Whether norms multiply by one plus their weight, in float32.
        is_stored_fused: Whether the checkpoint's query, key and value weights are one matrix, and
            gate and up weights another.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerDescription, ...]
    norm_epsilon: float
    activation: str
    attention_scale: float
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    has_qk_norm: bool = False
    has_post_norms: bool = False
    has_offset_norms: bool = False
    is_stored_fused: bool = False

    @property
    def rotary_types(self) -> frozenset[str]:
        """Rotary types of all layers."""
        return frozenset(layer.rotary_type for layer in self.layers)


@dataclass(frozen=True, slots=True)
class _Traits:
    """What the code of a model type fixes, so that its configurations do not say it.

    ``has_window``: whether ``sliding_window`` counts; in which layers, ``layer_types`` says.
    ``has_multipliers``: whether the factors of embeddings, residuals and scores count.
    """

    has_window: bool = False
    has_softcap: bool = False
    has_multipliers: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    has_offset_norms: bool = False
    has_rotary_by_type: bool = False
    is_stored_fused: bool = False


# Model types whose parity with transformers is tested.
_TRAITS = {
    "llama": _Traits(),
    "mistral": _Traits(has_window=True),
    "qwen2": _Traits(has_window=True),
    "qwen2_vl_text": _Traits(has_window=True),
    "qwen2_5_vl_text": _Traits(has_window=True),
    "qwen3": _Traits(has_window=True, has_qk_norm=True),
    "qwen3_vl_text": _Traits(has_qk_norm=True),
    "gemma2": _Traits(
        has_window=True, has_softcap=True, has_post_norms=True, has_offset_norms=True
    ),
    "gemma3_text": _Traits(
        has_window=True,
        has_qk_norm=True,
        has_post_norms=True,
        has_offset_norms=True,
        has_rotary_by_type=True,
    ),
    "phi3": _Traits(has_window=True, is_stored_fused=True),
    "granite": _Traits(has_multipliers=True),
}


def describe_decoder(text_config: transformers.PreTrainedConfig) -> DecoderDescription:
    """Read the description from the configuration of a text model.

    Raises:
        UnsupportedDecoderError: The model type is not one whose parity is tested, or a setting
            asks for something else than causal attention.
    """
    traits = _TRAITS.get(text_config.model_type)
    if traits is None:
        raise UnsupportedDecoderError(
            f"text models of type {text_config.model_type!r} are not among those whose parity is"
            f" tested: {', '.join(_TRAITS)}"
        )
    if getattr(text_config, "use_bidirectional_attention", None):
        raise UnsupportedDecoderError("the text model attends in both directions")
    num_q_heads: int = text_config.num_attention_heads
    description = DecoderDescription(
        num_q_heads=num_q_heads,
        num_kv_heads=getattr(text_config, "num_key_value_heads", None) or num_q_heads,
        head_dim=_read_head_dim(text_config),
        layers=_describe_layers(text_config, traits),
        norm_epsilon=text_config.rms_norm_eps,
        activation=getattr(text_config, "hidden_activation", None) or text_config.hidden_act,
        attention_scale=_read_attention_scale(text_config),
        attention_softcap=_read_softcap(text_config, traits),
        has_qk_norm=traits.has_qk_norm,
        has_post_norms=traits.has_post_norms,
        has_offset_norms=traits.has_offset_norms,
        is_stored_fused=traits.is_stored_fused,
    )
    return _add_multipliers(description, text_config) if traits.has_multipliers else description


def _describe_layers(
    text_config: transformers.PreTrainedConfig, traits: _Traits
) -> tuple[LayerDescription, ...]:
    window = (getattr(text_config, "sliding_window", None) or 0) if traits.has_window else 0
    if window >= text_config.max_position_embeddings:
        window = 0
    # Without types, a window is that of all layers.
    types = getattr(text_config, "layer_types", None)
    types = types or ["sliding_attention"] * text_config.num_hidden_layers
    return tuple(
        LayerDescription(
            window=window if layer_type == "sliding_attention" else 0,
            rotary_type=layer_type if traits.has_rotary_by_type else "",
        )
        for layer_type in types
    )


def _read_head_dim(text_config: transformers.PreTrainedConfig) -> int:
    head_dim: int | None = getattr(text_config, "head_dim", None)
    return head_dim or text_config.hidden_size // text_config.num_attention_heads


def _read_attention_scale(text_config: transformers.PreTrainedConfig) -> float:
    divisor: float | None = getattr(text_config, "query_pre_attn_scalar", None)
    return float((divisor or _read_head_dim(text_config)) ** -0.5)


def _read_softcap(text_config: transformers.PreTrainedConfig, traits: _Traits) -> float:
    softcap = text_config.attn_logit_softcapping if traits.has_softcap else None
    return float(softcap or 0.0)


def _add_multipliers(
    description: DecoderDescription, text_config: transformers.PreTrainedConfig
) -> DecoderDescription:
    return replace(
        description,
        attention_scale=float(text_config.attention_multiplier),
        embedding_scale=float(text_config.embedding_multiplier),
        residual_scale=float(text_config.residual_multiplier),
    )
