"""Lay constant matrices out in panels, in memory that a processor reads fastest.

Half a panel holds the weights of 32 outputs; words of four bytes, which are neighbouring inputs of
one output, lie side by side for all of them. Kernels read halves from their beginning to their end.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

# As in native.cpp: outputs of a panel and of half of one, and bytes of a word.
PANEL, HALF, _WORD = 64, 32, 4
# Words that the kernels multiply in one step.
_STEP_WORDS = 16
_HUGE_PAGE = 1 << 21
# Weights of one model share mappings of this size, so that little of a huge page is left over.
_MAPPING_BYTES = 64 << 20
_ALIGNMENT = 64


class WeightMemory:
    """Memory for weights that stay, in huge pages if the system gives them.

    With pages of 4 KiB, a decode step spends about a third of its time on finding them. Memory
    comes back to the system when nothing refers to any weight of a mapping.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return ``num_bytes`` that nobody else has, aligned to a cache line. uint8, zeros."""
        if len(self._free) < num_bytes:
            self._free = _map_huge_pages(max(num_bytes, _MAPPING_BYTES))
        taken = self._free[:num_bytes]
        self._free = self._free[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return taken


def pack_panels(matrix: torch.Tensor, memory: WeightMemory) -> torch.Tensor:
    """Return a copy of ``matrix`` in panels, filled up with zeros.

    Args:
        matrix: [num_outputs, num_inputs], of elements of one or two bytes.
        memory: Where the copy lies.

    Returns:
        [2 * num_panels, num_words, HALF, inputs of a word], dtype of ``matrix``; the number of
        words is a multiple of 16.
    """
    num_outputs, num_inputs = matrix.shape
    depth = _WORD // matrix.element_size()
    num_words = -(-num_inputs // (depth * _STEP_WORDS)) * _STEP_WORDS
    num_halves = -(-num_outputs // PANEL) * (PANEL // HALF)
    taken = memory.take(num_halves * num_words * HALF * _WORD)
    packed = taken.view(matrix.dtype).view(num_halves, num_words, HALF, depth)
    half = matrix.new_zeros(HALF, num_words * depth)
    for index, target in enumerate(packed):
        part = matrix[index * HALF : (index + 1) * HALF]
        half[len(part) :] = 0
        half[: len(part), :num_inputs] = part
        target.copy_(half.view(HALF, num_words, depth).transpose(0, 1))
    return packed


def pad_outputs(vector: torch.Tensor) -> torch.Tensor:
    """Return ``vector``, [num_outputs], as long as all panels together: kernels read it whole."""
    return torch.nn.functional.pad(vector, (0, -len(vector) % PANEL))


def _map_huge_pages(num_bytes: int) -> torch.Tensor:
    """Map memory of this process alone that begins with a huge page."""
    mapping = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # The kernel was built without them.
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + num_bytes]
