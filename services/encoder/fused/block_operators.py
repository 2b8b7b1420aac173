"""What a block of a fused tower computes, besides where its weights come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from chiasm.common.gate_after import RowMap

if TYPE_CHECKING:
    from chiasm.encoder.fused.norm import Norm
    from chiasm.encoder.fused.segments import Segments

# Returns the normed rows in new memory. [num_rows, width].
NormRows = Callable[[torch.Tensor], torch.Tensor]


class Linear(RowMap, Protocol):
    """A linear layer whose weight never changes: [num_rows, num_inputs] to [..., num_outputs]."""

    @property
    def num_inputs(self) -> int:
        """Width of the rows that it takes."""
        ...

    def add(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others + self(rows)``, rounded once."""
        ...


class InnerLinear(RowMap, Protocol):
    """A linear layer whose outputs a function is applied to, or multiply those of another."""

    def activate(self, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """Return ``activation(self(rows))``; see ``PackedLinear.activate``."""
        ...

    def multiply(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others * self(rows)``; may change ``others``."""
        ...


# Makes a layer of its weight, [num_outputs, num_inputs], and bias, [num_outputs] or ``None``.
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
# Makes one of the weights of gates and, below them, of their factors, and of all biases.
MakeGated = Callable[[torch.Tensor, torch.Tensor | None], RowMap]


class BlockOperators(Protocol):
    """Computes them, and makes the products; who does is the difference between two of these.

    Attributes:
        width_multiple: Widths of gated rows are filled up to multiples of it.
    """

    width_multiple: int

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Return a linear layer; see ``MakeLinear``."""
        ...

    def inner(self, weight: torch.Tensor, bias: torch.Tensor | None) -> InnerLinear:
        """Return a linear layer for ``activate``, or one that multiplies what it has returned."""
        ...

    def gated(self, activation: str) -> MakeGated | None:
        """Return what makes layers whose products are gated; ``None`` if there are none.

        Their weight is that of the gates, which ``activation`` is applied to, and then that of the
        factors: [2 * num_outputs, num_inputs].
        """
        ...

    def norm(self, norm: Norm) -> NormRows:
        """Return what computes ``norm``."""
        ...

    def activate(self, layer: InnerLinear, rows: torch.Tensor, activation: str) -> torch.Tensor:
        """Return ``activation(layer(rows))`` for any activation that transformers knows."""
        ...

    def rotate(self, heads: torch.Tensor, rotation: torch.Tensor) -> None:
        """Turn queries and keys in place; computed in float32.

        Args:
            heads: Queries, keys and values, in ``pair_order``.
                [num_rows, 3, num_heads, head_dim], contiguous.
            rotation: See ``make_rotation``.
        """
        ...

    def attend(self, heads: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Attend within every segment.

        Args:
            heads: Queries, keys and values. [num_rows, 3, num_heads, head_dim], contiguous.
            segments: Where the rows are cut.

        Returns:
            [num_rows, num_heads * head_dim], contiguous, dtype of ``heads``.
        """
        ...
