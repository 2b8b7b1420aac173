"""Call the compiled kernel for products of bfloat16 by tiles.

See ``tiled_linear.h`` for the formula and ``tile_product.h`` for the layout of a packed weight.
"""

from __future__ import annotations

import ctypes

import torch

from chiasm.kernels.cpu.weight_panels import WeightMemory, pack_panels, pad_outputs


class _TiledShape(ctypes.Structure):
    """``TiledShape`` of native.cpp."""

    _fields_ = (
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class TiledWeight:
    """A constant matrix of bfloat16 in panels, with the bias of each output."""

    __slots__ = ("_bias", "_packed", "_shape", "address", "num_inputs", "num_outputs")

    def __init__(
        self, matrix: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory
    ) -> None:
        """Copy both.

        Args:
            matrix: [num_outputs, num_inputs], bfloat16.
            bias: [num_outputs], or ``None``.
            memory: Where the matrix lies.
        """
        assert matrix.dtype is torch.bfloat16, "tiles multiply bfloat16"
        self.num_outputs, self.num_inputs = matrix.shape
        self._packed = pack_panels(matrix, memory)
        self._bias = None if bias is None else pad_outputs(bias.float())
        self._shape = _TiledShape(
            self.num_inputs,
            self.num_outputs,
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )
        self.address = ctypes.addressof(self._shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that it holds."""
        return self._packed.nbytes + (0 if self._bias is None else self._bias.nbytes)


class TiledKernel:
    """The compiled kernel; part of ``CpuKernels`` where the processor has tiles."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the kernel of ``library``."""
        self._multiply = library.chiasm_tiled_linear
        self._multiply.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 2]
        self._multiply.restype = None

    def multiply(self, weight: TiledWeight, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ matrix.T + bias``, summed in float32 and rounded once.

        Args:
            weight: What they are multiplied with.
            rows: [num_rows, num_inputs], bfloat16, contiguous; may have no rows.

        Returns:
            [num_rows, num_outputs], bfloat16. A row depends on nothing but itself, to the bit.
        """
        assert rows.dtype is torch.bfloat16, "tiles multiply bfloat16"
        assert rows.is_contiguous(), "rows lie one behind the other"
        num_rows, num_inputs = rows.shape
        assert num_inputs == weight.num_inputs, "rows are as wide as the weight"
        output = rows.new_empty(num_rows, weight.num_outputs)
        self._multiply(weight.address, num_rows, rows.data_ptr(), output.data_ptr())
        return output
