"""Multiply by a constant matrix of 8-bit integers.

Math: ``out[i, j] = (sum_k x_q[i, k] * w_q[j, k]) * x_scale[i] * w_scale[j] + bias[j]``, with
``x_scale[i] = max_k |x[i, k]| / 127`` and ``w_scale[j] = max_k |w[j, k]| / 127``.
A row has a scale of its own, so that it does not depend on what it is computed with.
"""

from __future__ import annotations

import torch

_MAX_INT8 = 127.0
# Rows are held as unsigned integers around this: CPUs without AMX have no other fast product.
_ZERO_POINT = 128
_TINY = 1e-12
# Rows for which oneDNN is asked to choose its layout; see ``packed_linear``.
_TYPICAL_ROWS = 512


class QuantizedLinear:
    """A linear layer whose weight never changes and whose products are of 8-bit integers."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        typical_rows: int = _TYPICAL_ROWS,
    ) -> None:
        """Quantize and pack ``weight``; the layer keeps no reference to it.

        Args:
            weight: [num_outputs, num_inputs], on a CPU.
            bias: [num_outputs], or ``None``.
            typical_rows: Rows of the inputs for which the layout is chosen.
        """
        self._num_inputs = weight.shape[1]
        self._dtype = weight.dtype
        integers, self._scales = _quantize(weight)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        shape = [typical_rows, self._num_inputs]
        packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(integers.to(torch.int8), shape)
        self._weight = packed
        self._bias = bias

    @property
    def num_inputs(self) -> int:
        """Width of the rows that it takes."""
        return self._num_inputs

    @property
    def num_bytes(self) -> int:
        """Bytes of weight, scales and bias."""
        bias_bytes = 0 if self._bias is None else self._bias.nbytes
        return self._weight.nbytes + self._scales.nbytes + self._zero_points.nbytes + bias_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T + bias``, nearly.

        Args:
            rows: [num_rows, num_inputs], dtype of the weight; may have no rows.

        Returns:
            [num_rows, num_outputs], dtype of the weight.
        """
        if not len(rows):
            return rows.new_empty(0, len(self._scales))
        integers, scales = _quantize(rows)
        products = torch.ops.onednn.qlinear_pointwise(
            integers.add_(_ZERO_POINT).to(torch.uint8),
            1.0,
            _ZERO_POINT,
            self._weight,
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
        return products.to(self._dtype)  # type: ignore[no-any-return]  # operators have no types


def can_quantize(device: torch.device) -> bool:
    """Return whether there are products of 8-bit integers on ``device``."""
    return device.type == "cpu" and torch._C._has_mkldnn


def _quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers within 127 of 0 for ``rows``, and the scale of each row; float32 both."""
    rows = rows.float()
    scales = rows.abs().amax(dim=1).clamp_(min=_TINY).div_(_MAX_INT8)
    return (rows / scales[:, None]).round_(), scales
