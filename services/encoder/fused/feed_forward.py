"""Compute the feed-forward part of a block of a fused tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from chiasm.encoder.fused.linear import take_weights

if TYPE_CHECKING:
    from chiasm.common.gate_after import RowMap
    from chiasm.encoder.fused.block_operators import BlockOperators, InnerLinear
    from chiasm.encoder.fused.description import BlockDescription


class FeedForward:
    """Linear layers that widen rows, a function or a gate, and a linear layer back."""

    def __init__(
        self, module: torch.nn.Module, description: BlockDescription, operators: BlockOperators
    ) -> None:
        """Take the weights of ``module``, a block that ``check_block`` has accepted."""
        make_gated = operators.gated(description.activation)
        down, down_bias = take_weights(module, (description.down,))
        self._widen: RowMap
        if make_gated is not None and len(description.inner) > 1:
            # What is added are gates of zero, times zero.
            added = -down.shape[1] % operators.width_multiple
            parts = [_fill_up(*take_weights(module, (name,)), added) for name in description.inner]
            biases = [bias for _, bias in parts if bias is not None]
            self._widen = make_gated(
                torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None
            )
            down = pad(down, (0, added)) if added else down
        else:
            layers = [operators.inner(*take_weights(module, (name,))) for name in description.inner]
            self._widen = _Activated(layers, description.activation, operators)
        self._down = operators.linear(down, down_bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return self._widen.num_bytes + self._down.num_bytes

    def add(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others`` and what the layers make of ``rows``.

        Args:
            rows: Normed hidden states. [num_rows, hidden_size], dtype of the tower.
            others: As ``rows``, contiguous.
        """
        return self._down.add(self._widen(rows), others)


def _fill_up(
    weight: torch.Tensor, bias: torch.Tensor | None, added: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a layer with ``added`` more outputs, of zero."""
    if not added:
        return weight, bias
    return pad(weight, (0, 0, 0, added)), None if bias is None else pad(bias, (0, added))


class _Activated:
    """A linear layer with a function; a second one multiplies its outputs."""

    def __init__(
        self, layers: list[InnerLinear], activation: str, operators: BlockOperators
    ) -> None:
        self._first, *self._factors = layers
        self._activation = activation
        self._operators = operators

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(layer.num_bytes for layer in (self._first, *self._factors))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        inner = self._operators.activate(self._first, rows, self._activation)
        for factor in self._factors:
            inner = factor.multiply(rows, inner)
        return inner
