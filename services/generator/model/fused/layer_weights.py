"""Take the weights of a transformers text model apart, layer by layer, into their fused form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chiasm.common.rms_norm import RMSNorm
from chiasm.generator.model.fused.description import UnsupportedDecoderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chiasm.common.gate_after import GateAfter
    from chiasm.generator.model.fused.description import DecoderDescription
    from chiasm.generator.model.fused.layer_operators import Gate
    from chiasm.generator.model.fused.linear_maker import Linear, LinearMaker

_NORMS = ("input_layernorm", "post_attention_layernorm")
_POST_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_SEPARATE_LINEARS = tuple(f"self_attn.{name}_proj" for name in "qkv")
_SEPARATE_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """What one layer multiplies with.

    Attributes:
        qkv: Query, key and value projections, one above the other.
        output: Projection of the attended values.
        gate_up: Gate and up projections, and the gate.
        down: Projection back to the hidden size.
        attention_norm: Norm of what the attention block reads.
        mlp_norm: Norm of what the feed-forward block reads.
        post_attention_norm: Norm of what the attention block adds; ``None`` for none.
        post_mlp_norm: Norm of what the feed-forward block adds; ``None`` for none.
        qk_norm: Norm of every query and key head; ``None`` for none.
    """

    qkv: Linear
    output: Linear
    gate_up: Linear | GateAfter
    down: Linear
    attention_norm: RMSNorm
    mlp_norm: RMSNorm
    post_attention_norm: RMSNorm | None
    post_mlp_norm: RMSNorm | None
    qk_norm: RMSNorm | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights of the layer."""
        parts = (getattr(self, name) for name in self.__slots__)
        return sum(part.num_bytes for part in parts if part is not None)


def check_layers(layers: Iterable[torch.nn.Module], description: DecoderDescription) -> None:
    """Check that ``take_layer`` would find and use every weight; nothing is changed.

    Raises:
        UnsupportedDecoderError: A module is missing, is not a plain linear layer, or there is one
            more than the description knows.
    """
    linears, norms = _list_modules(description)
    for layer in layers:
        owners = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
        if unknown := owners.symmetric_difference((*linears, *norms)):
            raise UnsupportedDecoderError(
                f"layers do not have the expected weights; differing: {', '.join(sorted(unknown))}"
            )
        for name in linears:
            if type(layer.get_submodule(name)) is not torch.nn.Linear:
                raise UnsupportedDecoderError(f"{name} is not a plain linear layer")


def take_layer(
    layer: torch.nn.Module,
    description: DecoderDescription,
    maker: LinearMaker,
    make_gate: Callable[[int], Gate],
) -> LayerWeights:
    """Move the weights of ``layer`` into their fused form; its modules lose their parameters.

    Args:
        layer: Decoder layer that ``check_layers`` has accepted.
        description: What the layer computes.
        maker: Lays out weights and their biases.
        make_gate: Makes a gate from its width.
    """

    def take(*names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return take_linears([layer.get_submodule(name) for name in names])

    def norm(name: str) -> RMSNorm:
        weight = take_norm_weight(layer.get_submodule(name), description)
        return RMSNorm(weight, description.norm_epsilon)

    is_fused, has_post = description.is_stored_fused, description.has_post_norms
    return LayerWeights(
        qkv=maker.linear(*take(*(("self_attn.qkv_proj",) if is_fused else _SEPARATE_LINEARS))),
        output=maker.linear(*take("self_attn.o_proj")),
        gate_up=maker.gated(
            *take(*(("mlp.gate_up_proj",) if is_fused else _SEPARATE_GATE_UP)),
            description.activation,
            make_gate,
        ),
        down=maker.linear(*take("mlp.down_proj")),
        attention_norm=norm("input_layernorm"),
        mlp_norm=norm("pre_feedforward_layernorm" if has_post else "post_attention_layernorm"),
        post_attention_norm=norm("post_attention_layernorm") if has_post else None,
        post_mlp_norm=norm("post_feedforward_layernorm") if has_post else None,
        qk_norm=_take_qk_norm(layer, description) if description.has_qk_norm else None,
    )


def take_linears(modules: list[torch.nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take the weights and biases of linear layers of one input, one above the other."""
    weights = [_take(module, "weight") for module in modules]
    biases = [_take(module, "bias") for module in modules if _has_bias(module)]
    assert len(biases) in (0, len(modules)), "what is fused has biases everywhere or nowhere"
    return _concatenate(weights), _concatenate(biases) if biases else None


def take_norm_weight(norm: torch.nn.Module, description: DecoderDescription) -> torch.Tensor:
    """Move the weight of a norm; see ``RMSNorm`` for its element type. [width]."""
    weight = _take(norm, "weight")
    return weight.float() + 1.0 if description.has_offset_norms else weight


def _list_modules(description: DecoderDescription) -> tuple[list[str], list[str]]:
    linears = ["self_attn.o_proj", "mlp.down_proj"]
    if description.is_stored_fused:
        linears += ["self_attn.qkv_proj", "mlp.gate_up_proj"]
    else:
        linears += [*_SEPARATE_LINEARS, *_SEPARATE_GATE_UP]
    norms = list(_NORMS)
    if description.has_post_norms:
        norms += _POST_NORMS
    if description.has_qk_norm:
        norms += _QK_NORMS
    return linears, norms


def _take_qk_norm(layer: torch.nn.Module, description: DecoderDescription) -> RMSNorm:
    """Return one norm of all query heads and key heads, [num_q_heads + num_kv_heads, head_dim]."""
    query, key = (
        take_norm_weight(layer.get_submodule(name), description).expand(num_heads, -1)
        for name, num_heads in zip(
            _QK_NORMS, (description.num_q_heads, description.num_kv_heads), strict=True
        )
    )
    return RMSNorm(torch.cat([query, key]), description.norm_epsilon)


def _has_bias(module: torch.nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _take(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Remove a parameter from ``module`` and return its values."""
    parameter = getattr(module, name)
    assert isinstance(parameter, torch.Tensor), "a parameter is a tensor"
    delattr(module, name)
    return parameter.detach()


def _concatenate(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
