"""Put an embedding together from the chunks that travel past the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import Embedding

if TYPE_CHECKING:
    from chiasm.common.media import EmbeddingRef


@dataclass(frozen=True, slots=True)
class EmbeddingPiece:
    """A piece of one tensor of an embedding; see ``EmbeddingChunk`` in ``media.proto``."""

    embedding_id: bytes
    tensor_index: int
    offset: int
    data: bytes
    is_last: bool


class EmbeddingAssembly:
    """Collects the pieces of one embedding, in order; memory grows with what arrives."""

    def __init__(self, ref: EmbeddingRef) -> None:
        self._ref = ref
        self._buffers = [bytearray() for _ in ref.tensors]
        self._index = 0

    def add(self, piece: EmbeddingPiece) -> Embedding | None:
        """Append ``piece``.

        Returns:
            The embedding if this was its last piece, else ``None``.

        Raises:
            InvalidRequestError: The piece is out of order, or does not fit the sizes of the ref
                (reason ``INVALID_EMBEDDING``). The assembly must not be used any more.
        """
        tensors = self._ref.tensors
        while self._index < len(tensors) - 1 and self._is_full(self._index):
            self._index += 1
        buffer = self._buffers[self._index]
        if piece.tensor_index != self._index or piece.offset != len(buffer):
            raise _refusal("An embedding chunk is out of order.")
        if not piece.data or len(buffer) + len(piece.data) > tensors[self._index].num_bytes:
            raise _refusal("An embedding chunk does not fit the embedding's size.")
        buffer += piece.data
        if piece.is_last != self._is_full(len(tensors) - 1):
            raise _refusal("The chunks of an embedding do not add up to its size.")
        if not piece.is_last:
            return None
        return Embedding(self._ref, [memoryview(buffer).toreadonly() for buffer in self._buffers])

    def _is_full(self, index: int) -> bool:
        return len(self._buffers[index]) == self._ref.tensors[index].num_bytes


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason="INVALID_EMBEDDING", param="chunk")
