"""Cut the tensors of an embedding into chunks and name each by its digest.

Chunks never span tensors: a tensor is cut into pieces of ``chunk_bytes``, the last one shorter::

    tensor 0: |chunk 0|chunk 1|ch 2|   tensor 1: |chunk 3|c4|
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.media import EmbeddingRef

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Bytes of one tensor that one chunk holds."""

    tensor_index: int
    offset: int
    num_bytes: int

    def of(self, buffers: Sequence[memoryview]) -> memoryview:
        """Return this span's bytes in the tensors' buffers, without copying."""
        return buffers[self.tensor_index][self.offset : self.offset + self.num_bytes]


def chunk_spans(ref: EmbeddingRef, chunk_bytes: int = CHUNK_BYTES) -> list[ChunkSpan]:
    """Return how the bytes of an embedding are cut into chunks, in order."""
    return [
        ChunkSpan(index, offset, min(chunk_bytes, spec.num_bytes - offset))
        for index, spec in enumerate(ref.tensors)
        for offset in range(0, spec.num_bytes, chunk_bytes)
    ]


def digest_of(chunk: memoryview) -> bytes:
    """Return the blake3 digest of a chunk."""
    return blake3(chunk).digest()
