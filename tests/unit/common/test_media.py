"""Domain types of media items."""

from __future__ import annotations

from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    TensorRole,
    TensorSpec,
    TokenRun,
)

LAYOUT = MediaLayout(runs=(TokenRun(3, 1, False), TokenRun(7, 2, True), TokenRun(4, 1, False)))


def test_a_layout_expands_its_runs_in_order() -> None:
    assert LAYOUT.expand() == [3, 7, 7, 4]
    assert LAYOUT.num_tokens == 4
    assert LAYOUT.num_embedding_tokens == 2


def test_a_ref_counts_the_bytes_of_all_tensors_but_only_spliced_rows() -> None:
    ref = EmbeddingRef(
        b"i" * 32,
        b"f" * 32,
        Modality.IMAGE,
        (
            TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (2, 8)),
            TensorSpec(TensorRole.DEEPSTACK, DataType.BFLOAT16, (2, 8), level=1),
        ),
    )

    assert ref.num_bytes == 2 * 8 * 4 + 2 * 8 * 2
    assert ref.num_splice_rows == 2


def test_a_span_ends_after_its_whole_expansion() -> None:
    ref = EmbeddingRef(b"i" * 32, b"f" * 32, Modality.IMAGE, ())

    assert MediaSpan(10, ref, LAYOUT, is_ready=False).end == 14
