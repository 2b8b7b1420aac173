"""Tests of ``chiasm.common.chunks``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.common.chunks import CHUNK_BYTES, ChunkSpan, chunk_spans, digest_chunks, fill_chunks
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


def test_chunks_put_together_are_the_tensors() -> None:
    embedding = make_embedding(make_ref(num_deepstack=1))
    spans = chunk_spans(embedding.ref, chunk_bytes=7)
    chunks = [span.of(embedding.buffers) for span in spans]
    buffers = [memoryview(bytearray(len(buffer))) for buffer in embedding.buffers]
    targets = [span.of(buffers) for span in spans]

    assert fill_chunks(targets, [bytes(chunk) for chunk in chunks], digest_chunks(chunks))

    assert buffers == embedding.buffers


@pytest.mark.parametrize("wrong", [b"ba", b"a", b"abc", None, 1, b""])
def test_a_wrong_content_is_told_and_not_copied(wrong: object) -> None:
    digests = digest_chunks([memoryview(b"ab"), memoryview(b"cd")])
    buffer = memoryview(bytearray(4))

    assert not fill_chunks([buffer[:2], buffer[2:]], [wrong, b"cd"], digests)

    assert bytes(buffer) == bytes(4)
