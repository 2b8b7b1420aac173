"""Translation between media messages and domain types."""

from __future__ import annotations

import pytest

from chiasm.common import convert
from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import (
    CacheStatus,
    DataType,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    PatchGrid,
    ProcessingOptions,
    RequestContext,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.v1 import media_pb2

SPEC = TensorSpec(TensorRole.SPLICE, DataType.BFLOAT16, (6, 8))
REF = EmbeddingRef(b"i" * 32, b"f" * 32, Modality.IMAGE, (SPEC,))
LAYOUT = MediaLayout(
    runs=(TokenRun(3, 1, False), TokenRun(7, 6, True), TokenRun(4, 1, False)),
    grid=PatchGrid(1, 4, 6),
    spatial_merge_size=2,
    timestamps_s=(0.0, 0.5),
)


def test_a_span_survives_the_round_trip() -> None:
    span = MediaSpan(5, REF, LAYOUT, is_ready=True)

    assert convert.span_from_proto(convert.span_to_proto(span)) == span


def test_a_deepstack_ref_survives_the_round_trip() -> None:
    deep = TensorSpec(TensorRole.DEEPSTACK, DataType.FLOAT32, (6, 8), level=2)
    ref = EmbeddingRef(b"i" * 32, b"f" * 32, Modality.VIDEO, (SPEC, deep))

    assert convert.ref_from_proto(convert.ref_to_proto(ref)) == ref


@pytest.mark.parametrize("status", list(CacheStatus))
def test_every_cache_status_survives_the_round_trip(status: CacheStatus) -> None:
    assert convert.cache_status_from_proto(convert.cache_status_to_proto(status)) is status


def test_absent_options_stay_absent_and_zero_stays_zero() -> None:
    options = ProcessingOptions(max_pixels=3136, background_rgb=0)

    assert convert.options_from_proto(convert.options_to_proto(options)) == options


def test_a_context_survives_the_round_trip() -> None:
    context = RequestContext("req-1", "1", "default", cache_salt="s", priority=-3)

    assert convert.context_from_proto(convert.context_to_proto(context)) == context


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""),
        ("request_id", "x" * 129),
        ("request_id", "a b"),
        ("attempt_id", "ä"),
        ("tenant", "x" * 65),
        ("tenant", "a/b"),
        ("cache_salt", "x" * 513),
    ],
)
def test_a_bad_context_field_is_refused_by_name(field: str, value: str) -> None:
    message = media_pb2.RequestContext(request_id="r", attempt_id="1", tenant="t")
    setattr(message, field, value)

    with pytest.raises(InvalidRequestError) as raised:
        convert.context_from_proto(message)

    assert raised.value.param == f"context.{field}"


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_digest_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"must have 32 bytes, got {length}"):
        convert.digest_from_proto(b"x" * length, "embedding_id")


@pytest.mark.parametrize("shape", [(), (0,), (1, 1, 1, 1, 1), (1 << 32, 1 << 32), (1 << 63, 4)])
def test_a_tensor_shape_outside_the_bounds_is_refused(shape: tuple[int, ...]) -> None:
    message = media_pb2.TensorSpec(
        role=media_pb2.TENSOR_ROLE_SPLICE, dtype=media_pb2.DATA_TYPE_FLOAT32, shape=shape
    )

    with pytest.raises(InvalidRequestError):
        convert.tensor_spec_from_proto(message)


@pytest.mark.parametrize("num_tensors", [0, convert.MAX_TENSORS + 1])
def test_a_ref_with_too_few_or_too_many_tensors_is_refused(num_tensors: int) -> None:
    message = convert.ref_to_proto(REF)
    del message.tensors[:]
    message.tensors.extend([convert.tensor_spec_to_proto(SPEC)] * num_tensors)

    with pytest.raises(InvalidRequestError, match="1 to 16 tensors"):
        convert.ref_from_proto(message)


def test_a_layout_without_runs_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="runs"):
        convert.layout_from_proto(media_pb2.MediaLayout())


def test_a_layout_that_expands_without_bound_is_refused() -> None:
    run = media_pb2.TokenRun(token_id=1, count=convert.MAX_LAYOUT_TOKENS, is_embedding=True)
    convert.layout_from_proto(media_pb2.MediaLayout(runs=[run]))

    with pytest.raises(InvalidRequestError, match="at most"):
        convert.layout_from_proto(media_pb2.MediaLayout(runs=[run, run]))


def test_a_grid_with_an_empty_side_is_refused() -> None:
    message = convert.layout_to_proto(LAYOUT)
    message.grid.h = 0

    with pytest.raises(InvalidRequestError, match="grid"):
        convert.layout_from_proto(message)


def test_a_span_whose_layout_and_rows_differ_is_refused() -> None:
    layout = MediaLayout(runs=(TokenRun(7, 5, True),))

    with pytest.raises(InvalidRequestError) as raised:
        convert.span_from_proto(convert.span_to_proto(MediaSpan(0, REF, layout, False)))

    assert raised.value.reason == "LAYOUT_MISMATCH"
