"""Call the compiled kernel for products of bfloat16 by tiles.

See ``tiled_linear.h`` for the formula and ``tile_product.h`` for the layout of a packed weight.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from chiasm.kernels.cpu.output_gate import gate_number, interleave_gate
from chiasm.kernels.cpu.weight_panels import pack_panels, pad_outputs

if TYPE_CHECKING:
    from chiasm.kernels.cpu.elementwise import Activation
    from chiasm.kernels.cpu.weight_panels import WeightMemory


class _TiledShape(ctypes.Structure):
    """``TiledShape`` of native.cpp."""

    _fields_ = (
        ("gate", ctypes.c_int32),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class TiledWeight:
    """A constant matrix of bfloat16 in panels, with the bias of each output."""

    __slots__ = ("_bias", "_packed", "_shape", "address", "has_gate", "num_inputs", "num_outputs")

    def __init__(
        self,
        matrix: torch.Tensor,
        bias: torch.Tensor | None,
        memory: WeightMemory,
        gate: Activation | None = None,
    ) -> None:
        """Copy both.

        Args:
            matrix: [num_outputs, num_inputs], bfloat16; with a gate, the rows of the gates and then
                those of their factors, [2 * num_outputs, num_inputs].
            bias: [num_outputs], or as many as the matrix has rows, or ``None``.
            memory: Where the matrix lies.
            gate: Function of a gate that outputs go through; ``None`` for none.
        """
        assert matrix.dtype is torch.bfloat16, "tiles multiply bfloat16"
        self.num_outputs, self.num_inputs = matrix.shape
        self.has_gate = gate is not None
        if gate is not None:
            self.num_outputs //= 2
            matrix = interleave_gate(matrix)
            bias = None if bias is None else interleave_gate(bias)
        self._packed = pack_panels(matrix, memory)
        self._bias = None if bias is None else pad_outputs(bias.float())
        self._shape = _TiledShape(
            gate_number(gate),
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
        self._multiply.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3]
        self._multiply.restype = None

    def multiply(
        self, weight: TiledWeight, rows: torch.Tensor, addend: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``rows @ matrix.T + bias + addend``, summed in float32, rounded, and then gated.

        Args:
            weight: What they are multiplied with.
            rows: [num_rows, num_inputs], bfloat16, contiguous; may have no rows.
            addend: [num_rows, num_outputs], bfloat16, contiguous; ``None`` for none, as with a
                gate.

        Returns:
            [num_rows, num_outputs], bfloat16. A row depends on nothing but itself, to the bit.
        """
        assert rows.dtype is torch.bfloat16, "tiles multiply bfloat16"
        assert rows.is_contiguous(), "rows lie one behind the other"
        num_rows, num_inputs = rows.shape
        assert num_inputs == weight.num_inputs, "rows are as wide as the weight"
        output = rows.new_empty(num_rows, weight.num_outputs)
        if addend is not None:
            assert not weight.has_gate, "a gate is the last function"
            assert addend.dtype is torch.bfloat16, "tiles multiply bfloat16"
            assert addend.shape == output.shape, "something is added to every output"
            assert addend.is_contiguous(), "rows lie one behind the other"
        self._multiply(
            weight.address,
            num_rows,
            rows.data_ptr(),
            None if addend is None else addend.data_ptr(),
            output.data_ptr(),
        )
        return output


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

    def add(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return ``others + self(rows)``, rounded once; without a gate.

        Args:
            rows: As for a call.
            others: [num_rows, num_outputs], bfloat16, contiguous.
        """
        return self._kernel.multiply(self._weight, rows.contiguous(), others)
