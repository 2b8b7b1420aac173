"""Tests of ``chiasm.common.chunks``."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.chunks import CHUNK_BYTES, ChunkSpan, chunk_spans, digest_of
from chiasm.common.media import DataType, EmbeddingRef, Modality, TensorRole, TensorSpec
from tests.fakes.embeddings import make_embedding, make_ref


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(1, 300))
def test_spans_cover_every_tensor_once_and_in_order(
    num_rows: int, width: int, num_deepstack: int, chunk_bytes: int
) -> None:
    ref = make_ref(num_rows, width, num_deepstack)
    ends = dict.fromkeys(range(len(ref.tensors)), 0)
    for span in chunk_spans(ref, chunk_bytes):
        assert span.offset == ends[span.tensor_index]
        assert 1 <= span.num_bytes <= chunk_bytes
        ends[span.tensor_index] += span.num_bytes
    assert list(ends.values()) == [spec.num_bytes for spec in ref.tensors]


def test_a_tensor_of_a_chunk_and_a_byte_takes_two_chunks() -> None:
    spec = TensorSpec(TensorRole.SPLICE, DataType.BFLOAT16, (1, CHUNK_BYTES // 2 + 1))
    ref = EmbeddingRef(bytes(32), bytes(32), Modality.IMAGE, (spec,))
    assert chunk_spans(ref) == [ChunkSpan(0, 0, CHUNK_BYTES), ChunkSpan(0, CHUNK_BYTES, 2)]


def test_spans_of_the_buffers_are_their_bytes_in_order() -> None:
    embedding = make_embedding(make_ref(num_deepstack=1))

    chunks = [span.of(embedding.buffers) for span in chunk_spans(embedding.ref, chunk_bytes=7)]

    assert b"".join(chunks) == b"".join(embedding.buffers)


def test_a_digest_is_the_blake3_of_the_bytes() -> None:
    digest = digest_of(memoryview(b"abc"))

    assert digest.hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
