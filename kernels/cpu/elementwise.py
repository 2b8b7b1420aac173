"""Call the compiled kernels for what lies between the matrix products of a layer.

Each takes its constant part as a rule that is made once. See ``elementwise.h`` for the formulas.
"""

from __future__ import annotations

import ctypes
from typing import Literal, get_args

import torch

# As transformers spells them.
Activation = Literal["silu", "gelu_pytorch_tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class _NormShape(ctypes.Structure):
    """``NormShape`` of native.cpp."""

    _fields_ = (
        ("is_bfloat16", ctypes.c_int32),
        ("is_weight_bfloat16", ctypes.c_int32),
        ("width", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class _GateShape(ctypes.Structure):
    """``GateShape`` of native.cpp."""

    _fields_ = (
        ("is_bfloat16", ctypes.c_int32),
        ("is_gelu", ctypes.c_int32),
        ("width", ctypes.c_int64),
    )


class _RopeShape(ctypes.Structure):
    """``RopeShape`` of native.cpp."""

    _fields_ = (
        ("is_bfloat16", ctypes.c_int32),
        ("is_weight_bfloat16", ctypes.c_int32),
        ("num_q_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
    )


class _PairShape(ctypes.Structure):
    """``PairShape`` of native.cpp."""

    _fields_ = (
        ("is_bfloat16", ctypes.c_int32),
        ("num_turned", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


class NormRule:
    """A root-mean-square norm behind a sum."""

    __slots__ = ("_shape", "_weight", "address", "dtype", "row_width")

    def __init__(
        self, weight: torch.Tensor, epsilon: float, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        """Keep the weight.

        Args:
            weight: [width], ``dtype`` or float32.
            epsilon: Added to the mean square.
            dtype: Of the rows: bfloat16 or float32.
            scale: Factor of what is added, rounded to ``dtype``, as torch does.

        Raises:
            ValueError: The dtypes do not go together.
        """
        _check_weight(weight, dtype)
        self._weight = weight.contiguous()
        self.dtype = dtype
        self.row_width = weight.shape[0]
        self._shape = _NormShape(
            dtype is torch.bfloat16,
            weight.dtype is torch.bfloat16,
            self.row_width,
            self._weight.data_ptr(),
            epsilon,
            torch.tensor(scale, dtype=dtype).item(),
        )
        self.address = ctypes.addressof(self._shape)


class GateRule:
    """A gate of a feed-forward block."""

    __slots__ = ("_shape", "address", "dtype", "row_width")

    def __init__(self, activation: Activation, width: int, dtype: torch.dtype) -> None:
        """Describe the gate.

        Args:
            activation: Its function.
            width: Of the gate; the rows that it reads are twice as wide.
            dtype: Of the rows: bfloat16 or float32.
        """
        self.dtype = dtype
        self.row_width = 2 * width
        is_gelu = activation == "gelu_pytorch_tanh"
        self._shape = _GateShape(dtype is torch.bfloat16, is_gelu, width)
        self.address = ctypes.addressof(self._shape)


class RopeRule:
    """How queries and keys are normed and turned."""

    __slots__ = ("_shape", "_weight", "address", "dtype", "head_dim", "row_width")

    def __init__(
        self,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        norm: tuple[torch.Tensor, float] | None = None,
    ) -> None:
        """Keep the weight of the norm.

        Args:
            heads: Query heads, key heads and their width.
            dtype: Of the rows: bfloat16 or float32.
            norm: Weight, [num_q_heads + num_kv_heads, head_dim], ``dtype`` or float32, and epsilon
                of a norm of every head before it is turned; ``None`` for none.

        Raises:
            ValueError: The dtypes do not go together.
        """
        num_q_heads, num_kv_heads, head_dim = heads
        self.dtype = dtype
        self.head_dim = head_dim
        self.row_width = (num_q_heads + 2 * num_kv_heads) * head_dim
        self._weight = None
        if norm is not None:
            _check_weight(norm[0], dtype)
            self._weight = norm[0].contiguous()
        self._shape = _RopeShape(
            dtype is torch.bfloat16,
            self._weight is not None and self._weight.dtype is torch.bfloat16,
            num_q_heads,
            num_kv_heads,
            head_dim,
            None if self._weight is None else self._weight.data_ptr(),
            0.0 if norm is None else norm[1],
        )
        self.address = ctypes.addressof(self._shape)


class PairRule:
    """Which heads of a row are turned, pair by pair."""

    __slots__ = ("_shape", "address", "dtype", "head_dim", "row_width")

    def __init__(self, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Describe the rows.

        Args:
            heads: Heads of a row, how many of them are turned, the first ones, and their width,
                which is even.
            dtype: Of the rows: bfloat16 or float32.
        """
        num_heads, num_turned, head_dim = heads
        assert head_dim % 2 == 0, "a head is made of pairs"
        assert num_turned <= num_heads, "a row has room for what is turned"
        self.dtype = dtype
        self.head_dim = head_dim
        self.row_width = num_heads * head_dim
        self._shape = _PairShape(dtype is torch.bfloat16, num_turned, head_dim, self.row_width)
        self.address = ctypes.addressof(self._shape)


class ElementwiseKernels:
    """The compiled kernels, run with one instruction set; part of ``CpuKernels``."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        """Take the kernels of ``library``; ``level`` is an index of ``native.LEVELS``."""
        self._level = level
        self._add_rms_norm = _declare(library.chiasm_add_rms_norm, 1, 3)
        self._gate = _declare(library.chiasm_gate, 1, 2)
        self._quick_gelu = library.chiasm_quick_gelu
        sizes = [ctypes.c_int64] * 2
        self._quick_gelu.argtypes = [ctypes.c_int, ctypes.c_int, *sizes, ctypes.c_void_p]
        self._quick_gelu.restype = None
        self._rope_store = _declare(library.chiasm_rope_store, 2, 6)
        self._turn_pairs = _declare(library.chiasm_turn_pairs, 1, 2)

    def add_rms_norm(
        self, rule: NormRule, hidden: torch.Tensor, addend: torch.Tensor | None
    ) -> torch.Tensor:
        """Add to ``hidden``, in place, and norm the sum.

        Args:
            rule: What it is normed with.
            hidden: [num_rows, width], contiguous.
            addend: As ``hidden``; multiplied by the rule's scale. ``None`` adds nothing.

        Returns:
            The normed rows, as ``hidden``. A row depends on nothing but itself, to the bit.
        """
        _check(hidden, rule)
        if addend is not None:
            _check(addend, rule)
        normed = torch.empty_like(hidden)
        self._add_rms_norm(
            self._level,
            rule.address,
            hidden.shape[0],
            hidden.data_ptr(),
            None if addend is None else addend.data_ptr(),
            normed.data_ptr(),
        )
        return normed

    def gate(self, rule: GateRule, gate_up: torch.Tensor) -> torch.Tensor:
        """Multiply the second half of rows by a function of the first.

        Args:
            rule: The function.
            gate_up: [num_rows, 2 * width], contiguous.

        Returns:
            [num_rows, width], contiguous. A row depends on nothing but itself, to the bit.
        """
        _check(gate_up, rule)
        num_rows = gate_up.shape[0]
        output = gate_up.new_empty(num_rows, rule.row_width // 2)
        self._gate(self._level, rule.address, num_rows, gate_up.data_ptr(), output.data_ptr())
        return output

    def quick_gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows by their sigmoids, in place; the arguments of these are 1.702 times them.

        Args:
            rows: [num_rows, width], bfloat16 or float32, contiguous.

        Returns:
            ``rows``. Values depend on nothing but themselves, to the bit.
        """
        assert rows.dtype in (torch.bfloat16, torch.float32), "there are kernels for these"
        assert rows.is_contiguous(), "rows lie one behind the other"
        is_bfloat16 = rows.dtype is torch.bfloat16
        self._quick_gelu(self._level, is_bfloat16, *rows.shape, rows.data_ptr())
        return rows

    def rope_store(
        self,
        rule: RopeRule,
        qkv: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Norm and turn queries and keys in place, and copy keys and values to the cache.

        Args:
            rule: Sizes and norm.
            qkv: All heads of queries, then of keys, then of values.
                [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], contiguous.
            tables: Cosines, and sines with the first half negated. Each
                [num_tokens, ..., rotary_dim], contiguous, dtype of ``qkv``. What is behind
                ``rotary_dim``, which is even, stays.
            slots: Slot of every token, each once. [num_tokens], int64, contiguous. The caller
                vouches for what it holds.
            cached: Keys and values. [num_slots, num_kv_heads, head_dim], contiguous, dtype of
                ``qkv``.
        """
        cos, sin = tables
        _check(qkv, rule)
        for table in tables:
            assert table.dtype is rule.dtype, "a table is as the rows"
            assert table.is_contiguous(), "a table is read as one piece"
            assert table.shape[0] == qkv.shape[0], "each token has its angles"
            assert table.shape[-1] == cos.shape[-1] <= rule.head_dim, "a head has room for them"
        assert slots.shape[0] == qkv.shape[0], "each token has its slot"
        self._rope_store(
            self._level,
            rule.address,
            qkv.shape[0],
            cos.shape[-1],
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            cached[0].data_ptr(),
            cached[1].data_ptr(),
        )

    def turn_pairs(self, rule: PairRule, rows: torch.Tensor, rotation: torch.Tensor) -> None:
        """Turn heads in place; values side by side are one complex number.

        Args:
            rule: Which heads.
            rows: [num_rows, num_heads * head_dim], contiguous.
            rotation: What each pair is multiplied with. [num_rows, head_dim / 2], complex64,
                contiguous.
        """
        _check(rows, rule)
        assert rotation.dtype is torch.complex64, "angles are complex numbers"
        assert rotation.is_contiguous(), "angles are read as one piece"
        assert rotation.shape == (rows.shape[0], rule.head_dim // 2), "each pair has its angle"
        self._turn_pairs(
            self._level, rule.address, rows.shape[0], rows.data_ptr(), rotation.data_ptr()
        )


def _declare(
    function: ctypes._NamedFuncPointer, num_sizes: int, num_tensors: int
) -> ctypes._NamedFuncPointer:
    """Say what ``function`` takes: level and shape, then sizes, then tensors."""
    sizes, tensors = [ctypes.c_int64] * num_sizes, [ctypes.c_void_p] * num_tensors
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, *sizes, *tensors]
    function.restype = None
    return function


def _check_weight(weight: torch.Tensor, dtype: torch.dtype) -> None:
    if weight.dtype not in (dtype, torch.float32):
        raise ValueError(f"rows of {dtype} do not go with a weight of {weight.dtype}")


def _check(rows: torch.Tensor, rule: NormRule | GateRule | RopeRule | PairRule) -> None:
    """Check what would make a kernel read memory that is not its own."""
    assert rows.dtype is rule.dtype, "rows are of the rule's type"
    assert rows.is_contiguous(), "rows lie one behind the other"
    assert rows.shape[1] == rule.row_width, "rows are as wide as the rule's"
