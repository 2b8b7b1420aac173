"""Multiply by a constant matrix of bfloat16 with the processor's tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.kernels.cpu.tiled_linear import TiledWeight

if TYPE_CHECKING:
    import torch

    from chiasm.kernels.cpu.elementwise import Activation
    from chiasm.kernels.cpu.tiled_linear import TiledKernel
    from chiasm.kernels.cpu.weight_panels import WeightMemory


class TiledLinear:
    """A linear layer whose weight never changes and whose products are our kernel's."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        _typical_rows: int = 0,
        *,
        kernel: TiledKernel,
        memory: WeightMemory,
        gate: Activation | None = None,
    ) -> None:
        """Pack ``weight``; the layer keeps no reference to it.

        Args:
            weight: [num_outputs, num_inputs], bfloat16, on a CPU; see ``TiledWeight`` for gates.
            bias: [num_outputs], or ``None``.
            kernel: What multiplies.
            memory: Where the packed weight lies.
            gate: Function of a gate that outputs go through; ``None`` for none.
        """
        self._weight = TiledWeight(weight, bias, memory, gate)
        self._kernel = kernel

    @property
    def num_inputs(self) -> int:
        """Width of the rows that it takes."""
        return self._weight.num_inputs

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self._weight.num_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T + bias``, or what a gate makes of it.

        Args:
            rows: [num_rows, num_inputs], bfloat16; may have no rows.

        Returns:
            [num_rows, num_outputs], bfloat16. A row depends on nothing but itself, to the bit.
        """
        return self._kernel.multiply(self._weight, rows.contiguous())
