"""Describe the blocks of a vision tower: all that a block's forward depends on besides weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers


class UnsupportedTowerError(Exception):
    """The fused tower does not compute towers of this kind; the message says why."""


@dataclass(frozen=True, slots=True)
class BlockDescription:
    """What the blocks of a tower compute, and where their weights are.

    Attributes:
        num_heads: Attention heads.
        head_dim: Width of each.
        activation: Name of the feed-forward function, as transformers spells it.
        norms: Modules of the norms before attention and feed-forward block.
        qkv: Modules of the query, key and value projections; one if they are stored fused.
        output: Module of the projection of the attended values.
        inner: Modules of the gate and up projections, or of the only projection upwards.
        down: Module of the projection back to the hidden size.
        has_rotary: Whether queries and keys are turned by their positions.
        has_bias: Whether linear layers have biases; all of them have, or none.
    """

    num_heads: int
    head_dim: int
    activation: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    output: str
    inner: tuple[str, ...]
    down: str
    has_rotary: bool = True
    has_bias: bool = True


@dataclass(frozen=True, slots=True)
class _Traits:
    """What the code of a tower's model type fixes, so that its configurations do not say it."""

    inner: tuple[str, ...]
    down: str
    norms: tuple[str, str] = ("norm1", "norm2")
    qkv: tuple[str, ...] = ("attn.qkv",)
    output: str = "attn.proj"
    has_rotary: bool = True
    has_bias: bool = True


_PICTURE_TRAITS = _Traits(
    inner=("mlp.fc1",),
    down="mlp.fc2",
    norms=("layer_norm1", "layer_norm2"),
    qkv=tuple(f"self_attn.{name}_proj" for name in "qkv"),
    output="self_attn.out_proj",
    has_rotary=False,
)
_AXIAL_TRAITS = _Traits(
    inner=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
    norms=("attention_norm", "ffn_norm"),
    qkv=tuple(f"attention.{name}_proj" for name in "qkv"),
    output="attention.o_proj",
    has_bias=False,
)
AXIAL_TOWER = "pixtral"
PICTURE_TOWERS = ("clip_vision_model", "siglip_vision_model")
# Types of towers whose parity with transformers is tested.
_TRAITS = {
    "qwen2_vl_vision": _Traits(inner=("mlp.fc1",), down="mlp.fc2"),
    "qwen2_5_vl_vision": _Traits(inner=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj"),
    "qwen3_vl_vision": _Traits(inner=("mlp.linear_fc1",), down="mlp.linear_fc2"),
    **dict.fromkeys(PICTURE_TOWERS, _PICTURE_TRAITS),
    AXIAL_TOWER: _AXIAL_TRAITS,
}


def describe_blocks(config: transformers.PreTrainedConfig) -> BlockDescription:
    """Read the description from the configuration of a vision tower.

    Raises:
        UnsupportedTowerError: The tower's type is not one whose parity is tested.
    """
    traits = _TRAITS.get(config.model_type)
    if traits is None:
        raise UnsupportedTowerError(
            f"towers of type {config.model_type!r} are not among those whose parity is tested:"
            f" {', '.join(_TRAITS)}"
        )
    num_heads: int = (
        config.num_heads if hasattr(config, "num_heads") else config.num_attention_heads
    )
    width: int = config.embed_dim if hasattr(config, "embed_dim") else config.hidden_size
    return BlockDescription(
        num_heads=num_heads,
        head_dim=width // num_heads,
        activation=config.hidden_act,
        norms=traits.norms,
        qkv=traits.qkv,
        output=traits.output,
        inner=traits.inner,
        down=traits.down,
        has_rotary=traits.has_rotary,
        has_bias=traits.has_bias,
    )
