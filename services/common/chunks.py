"""Cut the tensors of an embedding into chunks, name them by digest, and put them together again.

Chunks never span tensors: a tensor is cut into pieces of ``chunk_bytes``, the last one shorter::

    tensor 0: |chunk 0|chunk 1|ch 2|   tensor 1: |chunk 3|c4|
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def digest_chunks(chunks: Iterable[memoryview]) -> list[bytes]:
    """Return the blake3 digest of each chunk."""
    return [blake3(chunk).digest() for chunk in chunks]


def fill_chunks(
    targets: Sequence[memoryview], contents: Sequence[object], digests: Sequence[bytes]
) -> bool:
    """Copy each content into its target if it is the one that its digest names.

    Args:
        targets: Writable memory of each chunk.
        contents: What the store gave for each; anything but the right bytes is wrong.
        digests: The digest of each.

    Returns:
        Whether all were right. Nothing is copied from the first wrong one on.
    """
    for target, content, digest in zip(targets, contents, digests, strict=True):
        if not isinstance(content, bytes) or len(content) != target.nbytes:
            return False
        if blake3(content).digest() != digest:
            return False
        target[:] = content
    return True
