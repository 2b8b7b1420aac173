"""Gate what a product gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class RowMap(Protocol):
    """Maps rows to rows, by weights that never change."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return as many rows."""
        ...


class GateAfter:
    """A linear layer and the gate that reads what it returns."""

    def __init__(self, linear: RowMap, gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put ``gate`` behind ``linear``."""
        self._linear = linear
        self._gate = gate

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self._linear.num_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the gated products. [num_rows, num_inputs] to [num_rows, width of the gate]."""
        return self._gate(self._linear(rows))
