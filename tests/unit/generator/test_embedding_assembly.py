"""Embeddings from chunks: in order, of the announced size, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.generator.embedding_assembly import EmbeddingAssembly, EmbeddingPiece
from tests.fakes.embeddings import make_embedding, make_ref

REF = make_ref(num_rows=6, width=8, num_deepstack=1)
EMBEDDING = make_embedding(REF)
PIECE_BYTES = 40


def _pieces() -> list[EmbeddingPiece]:
    pieces = []
    for index, buffer in enumerate(EMBEDDING.buffers):
        for offset in range(0, len(buffer), PIECE_BYTES):
            data = bytes(buffer[offset : offset + PIECE_BYTES])
            pieces.append(EmbeddingPiece(REF.embedding_id, index, offset, data, is_last=False))
    pieces[-1] = replace(pieces[-1], is_last=True)
    return pieces


def test_pieces_in_order_make_the_embedding() -> None:
    assembly = EmbeddingAssembly(REF)
    pieces = _pieces()

    results = [assembly.add(piece) for piece in pieces]

    assert results[:-1] == [None] * (len(pieces) - 1)
    assert results[-1] is not None
    assert [bytes(buffer) for buffer in results[-1].buffers] == [
        bytes(buffer) for buffer in EMBEDDING.buffers
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 1},
        {"tensor_index": 1},
        {"tensor_index": 7},
        {"data": b""},
        {"data": b"x" * 1000},
        {"is_last": True},
    ],
    ids=str,
)
def test_piece_that_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    piece = replace(_pieces()[0], **wrong)  # type: ignore[arg-type]  # wrong on purpose

    with pytest.raises(InvalidRequestError) as refused:
        EmbeddingAssembly(REF).add(piece)

    assert refused.value.reason == "INVALID_EMBEDDING"


def test_last_piece_must_say_so() -> None:
    assembly = EmbeddingAssembly(REF)
    *first, last = _pieces()
    for piece in first:
        assembly.add(piece)

    with pytest.raises(InvalidRequestError, match="do not add up"):
        assembly.add(replace(last, is_last=False))
