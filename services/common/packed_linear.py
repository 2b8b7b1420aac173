"""Multiply by a constant matrix, laid out once in the order in which a CPU reads it fastest."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import gelu, linear, silu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Rows for which oneDNN is asked to choose its layout; the layout serves any number of rows, and
# one chosen for few rows makes prefill slower.
_TYPICAL_ROWS = 512
# Functions that oneDNN applies to a product before it rounds it: its name and variant, and what is
# computed without it.
_FUSED: Mapping[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": ("gelu", "none", gelu),
    "gelu_pytorch_tanh": ("gelu", "tanh", partial(gelu, approximate="tanh")),
    "silu": ("swish", "", silu),
}


class PackedLinear:
    """A linear layer whose weight never changes.

    On a CPU the weight is copied into oneDNN's blocked layout, if it has one for the element type;
    elsewhere the weight is kept as it is.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        typical_rows: int = _TYPICAL_ROWS,
    ) -> None:
        """Pack ``weight``; the layer keeps no reference to it if it was copied.

        Args:
            weight: [num_outputs, num_inputs].
            bias: [num_outputs], or ``None``.
            typical_rows: Rows of the inputs for which the layout is chosen.
        """
        self._is_packed = can_pack(weight)
        if self._is_packed:
            # Overloads are chosen here once and not by every call.
            self._multiply = torch.ops.mkldnn._linear_pointwise.default
            self._combine_with = torch.ops.mkldnn._linear_pointwise.binary
        self._weight = _pack(weight, typical_rows) if self._is_packed else weight
        self._bias = bias

    @property
    def is_packed(self) -> bool:
        """Whether the weight is in oneDNN's layout."""
        return self._is_packed

    @property
    def num_inputs(self) -> int:
        """Width of the rows that it takes."""
        return self._weight.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T + bias``.

        Args:
            rows: [num_rows, num_inputs], dtype of the weight; may have no rows.

        Returns:
            [num_rows, num_outputs], dtype of the weight.
        """
        if not self._is_packed:
            return linear(rows, self._weight, self._bias)
        return self._multiply(rows, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]  # operators have no types

    def activate(self, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """Return ``activation(self(rows))``, rounded once if the weight is packed.

        Args:
            rows: As for a call.
            activation: A name for which ``can_activate`` is true.
        """
        name, variant, function = _FUSED[activation]
        if not self._is_packed:
            return function(linear(rows, self._weight, self._bias))
        return self._multiply(rows, self._weight, self._bias, name, [], variant)  # type: ignore[no-any-return]  # as above

    def add(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others + self(rows)``, rounded once if the weight is packed.

        Args:
            rows: As for a call.
            others: [num_rows, num_outputs], dtype of the weight.
        """
        if not self._is_packed:
            return linear(rows, self._weight, self._bias).add_(others)
        return self._combine(rows, others, "add")

    def multiply(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others * self(rows)``, rounded once if the weight is packed; see ``add``."""
        if not self._is_packed:
            return linear(rows, self._weight, self._bias).mul_(others)
        return self._combine(rows, others, "mul")

    def _combine(self, rows: torch.Tensor, others: torch.Tensor, operation: str) -> torch.Tensor:
        return self._combine_with(rows, others, self._weight, self._bias, operation)  # type: ignore[no-any-return]  # as above


def can_activate(activation: str) -> bool:
    """Return whether ``PackedLinear.activate`` knows ``activation``, as transformers spells it."""
    return activation in _FUSED


def activation_of(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function for which ``can_activate`` is true."""
    return _FUSED[name][2]


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether oneDNN has a layout for ``weight`` on its device, and hardware for its dtype.

    float32 is worth it too: the packed form was measured at twice the speed of the plain one.
    """
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _pack(weight: torch.Tensor, typical_rows: int) -> torch.Tensor:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), typical_rows)
    assert isinstance(packed, torch.Tensor), "a weight is one tensor"
    return packed
