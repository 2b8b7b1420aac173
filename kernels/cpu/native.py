"""Load the compiled kernels for CPUs and call them.

The package's install compiles ``native.cpp`` where there is a compiler; see ADR 0007. Without the
result, callers compute the same with torch.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog
import torch

from chiasm.kernels.cpu.elementwise import ElementwiseKernels
from chiasm.kernels.cpu.quantized_linear import QuantizedKernel
from chiasm.kernels.cpu.tiled_linear import TiledKernel

if TYPE_CHECKING:
    from chiasm.kernels.cache_kernels import DecodeRule, PrefillRule

Level = Literal["plain", "avx2", "avx512", "amx"]
KernelChoice = Literal["auto", "off", "plain", "avx2", "avx512", "amx"]
# In the order in which native.cpp numbers them.
LEVELS: tuple[Level, ...] = ("plain", "avx2", "avx512", "amx")
DTYPES = (torch.bfloat16, torch.float32)

_INTERFACE_VERSION = 10
_REMEDY = "install g++ and then chiasm again: make install, or pip install -e ."

log = structlog.get_logger("chiasm.kernels")


class KernelsUnavailableError(Exception):
    """There are no compiled kernels, or they do not run here."""


class _DecodeShape(ctypes.Structure):
    """``DecodeShape`` of native.cpp."""

    _fields_ = (
        ("num_sequences", ctypes.c_int64),
        ("num_q_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _PrefillShape(ctypes.Structure):
    """``PrefillShape`` of native.cpp."""

    _fields_ = (
        ("num_chunks", ctypes.c_int64),
        ("num_q_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class CpuKernels:
    """The compiled kernels, run with one instruction set.

    They share torch's threads: ``torch.set_num_threads`` holds for them too.

    Attributes:
        elementwise: Those that compute rows one by one.
        quantized: Products of 8-bit integers.
        tiled: Products of bfloat16; ``None`` where the instruction set has no tiles.
    """

    def __init__(self, path: Path, level: Level | None = None) -> None:
        """Load the kernels at ``path``.

        Args:
            path: The shared library.
            level: Instruction set, one of ``LEVELS``; ``None`` takes the best of this machine.

        Raises:
            KernelsUnavailableError: They cannot be loaded, are of another version, or the machine
                lacks the instruction set.
        """
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsUnavailableError(f"cannot load {path.name}: {error}") from error
        version = self._library.chiasm_interface_version()
        if version != _INTERFACE_VERSION:
            raise KernelsUnavailableError(
                f"{path.name} has version {version}, but {_INTERFACE_VERSION} is needed"
            )
        best = self._library.chiasm_best_level()
        self._level = best if level is None else LEVELS.index(level)
        if self._level > best:
            raise KernelsUnavailableError(f"this machine has no {LEVELS[self._level]}")
        self._library.chiasm_paged_decode.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 7
        self._library.chiasm_paged_decode.restype = None
        self._library.chiasm_paged_prefill.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 8
        self._library.chiasm_paged_prefill.restype = None
        self.elementwise = ElementwiseKernels(self._library, self._level)
        self.quantized = QuantizedKernel(self._library, self._level)
        self.tiled = TiledKernel(self._library) if self.level == "amx" else None

    @property
    def level(self) -> Level:
        """The instruction set, one of ``LEVELS``."""
        return LEVELS[self._level]

    def paged_decode(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        contexts: tuple[torch.Tensor, torch.Tensor],
        rule: DecodeRule,
    ) -> torch.Tensor:
        """Attend with one query per sequence to its context, where that lies in the cache.

        Args:
            query: [num_sequences, num_q_heads, head_dim], one of ``DTYPES``.
            cached: Keys and values. [num_slots, num_kv_heads, head_dim], contiguous, dtype of
                ``query``.
            contexts: Block tables, [num_sequences, max_blocks], and context lengths, at least 1,
                [num_sequences]; int64, contiguous. The caller vouches for what they hold.
            rule: How scores are made.

        Returns:
            What each query attends to, as ``query``, contiguous. A row depends on its own sequence
            alone, to the bit.
        """
        (keys, values), (tables, lengths) = cached, contexts
        num_sequences, num_q_heads, head_dim = query.shape
        if query.stride()[1:] != (head_dim, 1):
            query = query.contiguous()
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        shape = _DecodeShape(
            num_sequences,
            num_q_heads,
            keys.shape[1],
            head_dim,
            query.stride(0),
            tables.stride(0),
            rule.block_size,
            rule.window,
            rule.scale,
            rule.softcap,
        )
        tensors = (query, keys, values, tables, lengths, output)
        self._library.chiasm_paged_decode(
            self._level,
            query.dtype is torch.bfloat16,
            ctypes.addressof(shape),
            *map(torch.Tensor.data_ptr, tensors),
        )
        return output

    def paged_prefill(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        contexts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rule: PrefillRule,
        output: torch.Tensor,
    ) -> None:
        """Attend with the rows of chunks of prompts to their contexts, where they lie in the cache.

        Args:
            query: [num_rows, num_q_heads, head_dim], one of ``DTYPES``.
            cached: As in ``paged_decode``, but slots may lie apart, those of keys as far as those
                of values.
            contexts: First row and number of rows of each chunk, [num_chunks, 2]; block tables,
                [num_chunks, max_blocks]; and the range of positions that each row sees, never
                empty, [num_rows, 2]; int64, contiguous. The caller vouches for what they hold.
            rule: How scores are made.
            output: Where what the rows of chunks attend to is put; other rows are left alone. As
                ``query``, contiguous. A row depends on its own sequence alone, to the bit, and not
                on how that is cut into chunks.
        """
        (keys, values), (chunks, tables, seen) = cached, contexts
        _, num_q_heads, head_dim = query.shape
        assert keys.stride() == values.stride(), "keys lie as values do"
        assert keys.stride()[1:] == (head_dim, 1), "the heads of a slot lie one behind the other"
        if query.stride(2) != 1:
            query = query.contiguous()
        shape = _PrefillShape(
            len(chunks),
            num_q_heads,
            keys.shape[1],
            head_dim,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            tables.stride(0),
            rule.block_size,
            rule.scale,
            rule.softcap,
        )
        tensors = (query, keys, values, tables, chunks, seen, output)
        self._library.chiasm_paged_prefill(
            self._level,
            query.dtype is torch.bfloat16,
            ctypes.addressof(shape),
            *(tensor.data_ptr() for tensor in tensors),
        )


def find_kernels(choice: KernelChoice) -> CpuKernels | None:
    """Return the kernels that the install has compiled, or ``None`` for torch, and log which.

    Args:
        choice: The instruction set; ``auto`` takes the best of this machine, and torch if there are
            no kernels or only plain ones; ``off`` takes torch.

    Raises:
        KernelsUnavailableError: An instruction set was asked for that cannot be had.
    """
    if choice == "off":
        log.info("cpu_kernels_chosen", kernels="torch", reason="asked for")
        return None
    try:
        kernels = CpuKernels(_compiled_path(), None if choice == "auto" else choice)
    except KernelsUnavailableError as error:
        if choice != "auto":
            raise
        log.info("cpu_kernels_chosen", kernels="torch", reason=str(error), remedy=_REMEDY)
        return None
    if choice == "auto" and kernels.level == "plain":
        log.info("cpu_kernels_chosen", kernels="torch", reason="plain kernels are slower than it")
        return None
    log.info("cpu_kernels_chosen", kernels=kernels.level)
    return kernels


def _compiled_path() -> Path:
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        raise KernelsUnavailableError("the install found no compiler")
    return found[0]
