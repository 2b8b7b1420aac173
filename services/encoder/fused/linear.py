"""Take linear layers of transformers' towers, and apply the functions behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.activations import ACT2FN

from chiasm.common.packed_linear import PackedLinear, can_activate
from chiasm.encoder.fused.description import UnsupportedTowerError

if TYPE_CHECKING:
    from chiasm.encoder.fused.block_operators import InnerLinear


def check_linears(owner: torch.nn.Module, names: tuple[str, ...], *, has_bias: bool = True) -> None:
    """Check that the modules ``names`` of ``owner`` are plain linear layers.

    Raises:
        UnsupportedTowerError: One is missing or is something else, or it has no bias although
            ``has_bias``, or the other way round.
    """
    for name in names:
        try:
            module = owner.get_submodule(name)
        except AttributeError as error:
            raise UnsupportedTowerError(f"there is no module {name}") from error
        if type(module) is not torch.nn.Linear or (module.bias is not None) != has_bias:
            wanted = "with a bias" if has_bias else "without a bias"
            raise UnsupportedTowerError(f"{name} is not a plain linear layer {wanted}")


def take_weights(
    owner: torch.nn.Module, names: tuple[str, ...], order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Remove linear layers of one input and return their weights and biases, one above the other.

    Args:
        owner: Module below which ``names`` are.
        names: Modules that ``check_linears`` has accepted.
        order: Output that each output becomes: an index of the rows. [num_outputs].

    Returns:
        [num_outputs, num_inputs]; and [num_outputs], or ``None`` without biases.
    """
    modules = [owner.get_submodule(name) for name in names]
    weight = _concatenate([take_parameter(module, "weight") for module in modules])
    bias = None
    if all(module.bias is not None for module in modules):
        bias = _concatenate([take_parameter(module, "bias") for module in modules])
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    return weight, bias


def take_linears(owner: torch.nn.Module, names: tuple[str, ...]) -> PackedLinear:
    """Move linear layers into one packed layer; see ``take_weights``."""
    return PackedLinear(*take_weights(owner, names))


def take_parameter(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Remove a parameter from ``module`` and return its values."""
    parameter = getattr(module, name)
    assert isinstance(parameter, torch.Tensor), "a parameter is a tensor"
    delattr(module, name)
    return parameter.detach()


def activate(layer: InnerLinear, rows: torch.Tensor, activation: str) -> torch.Tensor:
    """Return ``activation(layer(rows))`` for any activation that transformers knows."""
    if can_activate(activation):
        return layer.activate(rows, activation)
    product = layer(rows)
    if activation == "quick_gelu":
        return torch.mul(product, 1.702).sigmoid_().mul_(product)
    activated = ACT2FN[activation](product)
    assert isinstance(activated, torch.Tensor), "an activation maps tensors"
    return activated


def _concatenate(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
