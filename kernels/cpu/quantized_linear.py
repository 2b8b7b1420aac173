"""Call the compiled kernel for products of 8-bit integers.

See ``quantized_linear.h`` for the formula and the layout of a packed weight.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from chiasm.kernels.cpu.output_gate import gate_number, interleave_gate
from chiasm.kernels.cpu.weight_panels import WeightMemory, pack_panels, pad_outputs

if TYPE_CHECKING:
    from chiasm.kernels.cpu.elementwise import Activation

# With more inputs, a sum of products might not fit 32 bits.
MAX_INPUTS = 65_536


class _QuantizedShape(ctypes.Structure):
    """``QuantizedShape`` of native.cpp."""

    _fields_ = (
        ("is_bfloat16", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class QuantizedWeight:
    """A constant matrix of 8-bit integers, packed, with the scale and the bias of each output."""

    __slots__ = ("_packed", "_shape", "_vectors", "address", "dtype", "num_inputs", "num_outputs")

    def __init__(
        self,
        integers: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        memory: WeightMemory | None = None,
        gate: Activation | None = None,
    ) -> None:
        """Copy all that is given.

        Args:
            integers: [num_outputs, num_inputs], int8, none of them -128; with a gate, those of the
                gates and then those of their factors, [2 * num_outputs, num_inputs].
            scales: [num_outputs], or as many as there are rows of integers, float32.
            bias: As ``scales``, or ``None``.
            dtype: Of the rows: bfloat16 or float32.
            memory: Where the integers lie; ``None`` for memory of their own.
            gate: Function of a gate that outputs go through; ``None`` for none.

        Raises:
            ValueError: There are more than ``MAX_INPUTS`` inputs.
        """
        self.num_outputs, self.num_inputs = integers.shape
        if self.num_inputs > MAX_INPUTS:
            raise ValueError(f"{self.num_inputs} inputs are more than {MAX_INPUTS}")
        self.dtype = dtype
        vectors = [integers.sum(1, dtype=torch.int32), scales]
        if bias is not None:
            vectors.append(bias.float())
        if gate is not None:
            self.num_outputs //= 2
            integers, vectors = interleave_gate(integers), [*map(interleave_gate, vectors)]
        self._packed = pack_panels(integers, memory or WeightMemory())
        self._vectors = [pad_outputs(vector) for vector in vectors]
        addresses = [vector.data_ptr() for vector in self._vectors]
        self._shape = _QuantizedShape(
            dtype is torch.bfloat16,
            gate_number(gate),
            self.num_inputs,
            self.num_outputs,
            self._packed.data_ptr(),
            *addresses,
        )
        self.address = ctypes.addressof(self._shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that it holds."""
        return self._packed.nbytes + sum(vector.nbytes for vector in self._vectors)


class QuantizedKernel:
    """The compiled kernel, run with one instruction set; part of ``CpuKernels``."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        """Take the kernel of ``library``; ``level`` is an index of ``native.LEVELS``."""
        self._level = level
        self._multiply = library.chiasm_quantized_linear
        self._multiply.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._multiply.restype = None

    def multiply(self, weight: QuantizedWeight, rows: torch.Tensor) -> torch.Tensor:
        """Return the products of ``rows``, as integers, and ``weight``.

        Args:
            weight: What they are multiplied with.
            rows: [num_rows, num_inputs], dtype of ``weight``, contiguous; may have no rows.

        Returns:
            [num_rows, num_outputs], as ``rows``. A row depends on nothing but itself, to the bit,
            and not on the instruction set.
        """
        assert rows.dtype is weight.dtype, "rows are of the weight's type"
        assert rows.is_contiguous(), "rows lie one behind the other"
        num_rows, num_inputs = rows.shape
        assert num_inputs == weight.num_inputs, "rows are as wide as the weight"
        output = rows.new_empty(num_rows, weight.num_outputs)
        self._multiply(self._level, weight.address, num_rows, rows.data_ptr(), output.data_ptr())
        return output
