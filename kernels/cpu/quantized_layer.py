"""Multiply by a constant matrix of 8-bit integers.

Math: ``out[i, j] = (sum_k x_q[i, k] * w_q[j, k]) * x_scale[i] * w_scale[j] + bias[j]``, with
``x_scale[i] = max_k |x[i, k]| / 127`` and ``w_scale[j] = max_k |w[j, k]| / 127``.
A row has a scale of its own, so that it does not depend on what it is computed with.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from chiasm.kernels.cpu.quantized_linear import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.kernels.cpu.elementwise import Activation
    from chiasm.kernels.cpu.native import CpuKernels
    from chiasm.kernels.cpu.weight_panels import WeightMemory

# How the weights of linear layers are held.
Quantization = Literal["none", "w8a8"]

_MAX_INT8 = 127.0
# oneDNN holds rows as unsigned integers around this: it has no other fast product without AMX.
_ZERO_POINT = 128
_TINY = 1e-12
# Rows for which oneDNN is asked to choose its layout; see ``packed_linear``.
_TYPICAL_ROWS = 512
# Outputs whose weights are quantized at once, so that few are held in float32.
_OUTPUTS_AT_ONCE = 4096


class QuantizedLinear:
    """A linear layer whose weight never changes and whose products are of 8-bit integers.

    Our kernels for CPUs multiply, or oneDNN if there are none.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        typical_rows: int = _TYPICAL_ROWS,
        kernels: CpuKernels | None = None,
        memory: WeightMemory | None = None,
        gate: Activation | None = None,
    ) -> None:
        """Quantize and pack ``weight``; the layer keeps no reference to it.

        Args:
            weight: [num_outputs, num_inputs], on a CPU; with kernels, one of their ``DTYPES``.
            bias: [num_outputs], or ``None``.
            typical_rows: Rows of the inputs for which oneDNN chooses the layout.
            kernels: What multiplies; ``None`` for oneDNN.
            memory: Where the packed weight of our kernels lies; ``None`` for memory of its own.
            gate: With kernels, the function of a gate that outputs go through; ``None`` for none.
        """
        self._num_inputs = weight.shape[1]
        integers, scales = _quantize_weight(weight)
        self._weight: QuantizedWeight | _OneDnnWeight
        self._multiply: Callable[[torch.Tensor], torch.Tensor]
        if kernels is None:
            self._weight = _OneDnnWeight(integers, scales, bias, typical_rows)
            self._multiply = self._weight.multiply
        else:
            self._weight = QuantizedWeight(integers, scales, bias, weight.dtype, memory, gate)
            self._multiply = partial(kernels.quantized.multiply, self._weight)

    @property
    def num_inputs(self) -> int:
        """Width of the rows that it takes."""
        return self._num_inputs

    @property
    def num_bytes(self) -> int:
        """Bytes of weight, scales and bias."""
        return self._weight.num_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return nearly ``rows @ weight.T + bias``, or what a gate makes of it.

        Args:
            rows: [num_rows, num_inputs], dtype of the weight; may have no rows.

        Returns:
            [num_rows, num_outputs], dtype of the weight.
        """
        return self._multiply(rows.contiguous())

    def add(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others + self(rows)``.

        Args:
            rows: As for a call.
            others: [num_rows, num_outputs], dtype of the weight.
        """
        return self(rows).add_(others)

    def multiply(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others * self(rows)``; see ``add``."""
        return self(rows).mul_(others)


def can_quantize(device: torch.device, kernels: CpuKernels | None = None) -> bool:
    """Return whether there are products of 8-bit integers on ``device``.

    Args:
        device: Where they would be computed.
        kernels: Our kernels; ``None`` if there are none.
    """
    return device.type == "cpu" and (kernels is not None or torch._C._has_mkldnn)


class _OneDnnWeight:
    """A matrix of integers in oneDNN's layout, with the scale and the bias of each output."""

    def __init__(
        self,
        integers: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        typical_rows: int,
    ) -> None:
        """Pack ``integers``; see ``QuantizedWeight`` for the arguments."""
        num_outputs, num_inputs = integers.shape
        packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(
            integers, [typical_rows, num_inputs]
        )
        self._packed = packed
        self._scales = scales
        self._zero_points = torch.zeros(num_outputs, dtype=torch.int32)
        self._bias = bias

    @property
    def num_bytes(self) -> int:
        """Bytes of all that it holds."""
        bias_bytes = 0 if self._bias is None else self._bias.nbytes
        return self._packed.nbytes + self._scales.nbytes + self._zero_points.nbytes + bias_bytes

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the products of ``rows``, as integers, and the weight, in the rows' dtype."""
        if not len(rows):
            return rows.new_empty(0, len(self._scales))
        integers, scales = _quantize(rows)
        products = torch.ops.onednn.qlinear_pointwise(
            integers.add_(_ZERO_POINT).to(torch.uint8),
            1.0,
            _ZERO_POINT,
            self._packed,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        products *= scales[:, None]
        if self._bias is not None:
            products += self._bias
        return products.to(rows.dtype)  # type: ignore[no-any-return]  # operators have no types


def _quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers, int8, and the scale of each output, float32."""
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    for start in range(0, len(weight), _OUTPUTS_AT_ONCE):
        part = slice(start, start + _OUTPUTS_AT_ONCE)
        integers[part], scales[part] = _quantize(weight[part])
    return integers, scales


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers within 127 of 0 for ``rows``, and the scale of each row; float32 both."""
    rows = rows.float()
    scales = rows.abs().amax(dim=1).clamp_(min=_TINY).div_(_MAX_INT8)
    return (rows / scales[:, None]).round_(), scales
