"""Translate between the messages of ``media.proto`` and the domain types of ``media.py``.

Every ``*_from_proto`` validates: what it returns can be used without a further look, and what it
refuses is an ``InvalidRequestError`` that names the field.
"""

from __future__ import annotations

from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import (
    DIGEST_BYTES,
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
from chiasm.v1 import generator_pb2, media_pb2

MAX_TENSORS = 16
MAX_DIMENSIONS = 4
MAX_TENSOR_BYTES = 1 << 31
MAX_RUNS = 65536
MAX_LAYOUT_TOKENS = 1 << 22

_MODALITY_TO_PROTO = {
    Modality.IMAGE: media_pb2.MODALITY_IMAGE,
    Modality.VIDEO: media_pb2.MODALITY_VIDEO,
    Modality.AUDIO: media_pb2.MODALITY_AUDIO,
}
_DATA_TYPE_TO_PROTO = {
    DataType.FLOAT32: media_pb2.DATA_TYPE_FLOAT32,
    DataType.FLOAT16: media_pb2.DATA_TYPE_FLOAT16,
    DataType.BFLOAT16: media_pb2.DATA_TYPE_BFLOAT16,
}
_ROLE_TO_PROTO = {
    TensorRole.SPLICE: media_pb2.TENSOR_ROLE_SPLICE,
    TensorRole.DEEPSTACK: media_pb2.TENSOR_ROLE_DEEPSTACK,
    TensorRole.CROSS_ATTENTION: media_pb2.TENSOR_ROLE_CROSS_ATTENTION,
}
_CACHE_STATUS_TO_PROTO = {
    CacheStatus.HIT: media_pb2.CACHE_STATUS_HIT,
    CacheStatus.MISS: media_pb2.CACHE_STATUS_MISS,
    CacheStatus.INLINE: media_pb2.CACHE_STATUS_INLINE,
}
_MODALITY_FROM_PROTO = {value: key for key, value in _MODALITY_TO_PROTO.items()}
_DATA_TYPE_FROM_PROTO = {value: key for key, value in _DATA_TYPE_TO_PROTO.items()}
_ROLE_FROM_PROTO = {value: key for key, value in _ROLE_TO_PROTO.items()}
_CACHE_STATUS_FROM_PROTO = {value: key for key, value in _CACHE_STATUS_TO_PROTO.items()}


def modality_to_proto(modality: Modality) -> media_pb2.Modality.ValueType:
    """Return the enum value of ``modality``."""
    return _MODALITY_TO_PROTO[modality]


def modality_from_proto(value: media_pb2.Modality.ValueType) -> Modality:
    """Return the modality of an enum value; raise ``InvalidRequestError`` if unknown."""
    if value not in _MODALITY_FROM_PROTO:
        raise InvalidRequestError(f"Unknown modality {value}.", param="modality")
    return _MODALITY_FROM_PROTO[value]


def data_type_to_proto(dtype: DataType) -> media_pb2.DataType.ValueType:
    """Return the enum value of ``dtype``."""
    return _DATA_TYPE_TO_PROTO[dtype]


def data_type_from_proto(value: media_pb2.DataType.ValueType) -> DataType:
    """Return the element type of an enum value; raise ``InvalidRequestError`` if unknown."""
    if value not in _DATA_TYPE_FROM_PROTO:
        raise InvalidRequestError(f"Unknown tensor dtype {value}.", param="dtype")
    return _DATA_TYPE_FROM_PROTO[value]


def cache_status_to_proto(status: CacheStatus) -> media_pb2.CacheStatus.ValueType:
    """Return the enum value of ``status``."""
    return _CACHE_STATUS_TO_PROTO[status]


def cache_status_from_proto(value: media_pb2.CacheStatus.ValueType) -> CacheStatus:
    """Return the cache status of an enum value; raise ``InvalidRequestError`` if unknown."""
    if value not in _CACHE_STATUS_FROM_PROTO:
        raise InvalidRequestError(f"Unknown cache status {value}.", param="cache_status")
    return _CACHE_STATUS_FROM_PROTO[value]


def digest_from_proto(value: bytes, field: str) -> bytes:
    """Return ``value`` if it is a 32-byte digest, else raise ``InvalidRequestError``."""
    if len(value) != DIGEST_BYTES:
        raise InvalidRequestError(
            f"{field} must have {DIGEST_BYTES} bytes, got {len(value)}.", param=field
        )
    return value


def context_to_proto(context: RequestContext) -> media_pb2.RequestContext:
    """Return the message of ``context``."""
    return media_pb2.RequestContext(
        request_id=context.request_id,
        attempt_id=context.attempt_id,
        tenant=context.tenant,
        model=context.model,
        adapter=context.adapter,
        cache_salt=context.cache_salt,
        priority=context.priority,
    )


def context_from_proto(message: media_pb2.RequestContext) -> RequestContext:
    """Return the validated context of a message; raise ``InvalidRequestError`` naming the field."""
    for field, limit in (("request_id", 128), ("attempt_id", 128), ("tenant", 64)):
        value = getattr(message, field)
        if not 1 <= len(value) <= limit or not _is_name(value):
            raise InvalidRequestError(
                f"context.{field} must have 1 to {limit} characters of A-Z a-z 0-9 . _ : -.",
                param=f"context.{field}",
            )
    for field in ("model", "adapter", "cache_salt"):
        if len(getattr(message, field)) > 512:
            raise InvalidRequestError(
                f"context.{field} must have at most 512 characters.", param=f"context.{field}"
            )
    return RequestContext(
        request_id=message.request_id,
        attempt_id=message.attempt_id,
        tenant=message.tenant,
        model=message.model,
        adapter=message.adapter,
        cache_salt=message.cache_salt,
        priority=message.priority,
    )


def options_to_proto(options: ProcessingOptions) -> media_pb2.ProcessingOptions:
    """Return the message of ``options``; absent values stay absent."""
    return media_pb2.ProcessingOptions(
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        fps=options.fps,
        num_frames=options.num_frames,
        background_rgb=options.background_rgb,
    )


def options_from_proto(message: media_pb2.ProcessingOptions) -> ProcessingOptions:
    """Return the options of a message; the server's limits are applied by the encoder."""
    return ProcessingOptions(
        min_pixels=message.min_pixels if message.HasField("min_pixels") else None,
        max_pixels=message.max_pixels if message.HasField("max_pixels") else None,
        fps=message.fps if message.HasField("fps") else None,
        num_frames=message.num_frames if message.HasField("num_frames") else None,
        background_rgb=message.background_rgb if message.HasField("background_rgb") else None,
    )


def tensor_spec_to_proto(spec: TensorSpec) -> media_pb2.TensorSpec:
    """Return the message of ``spec``."""
    return media_pb2.TensorSpec(
        role=_ROLE_TO_PROTO[spec.role],
        level=spec.level,
        dtype=_DATA_TYPE_TO_PROTO[spec.dtype],
        shape=spec.shape,
    )


def tensor_spec_from_proto(message: media_pb2.TensorSpec) -> TensorSpec:
    """Return the validated spec of a message; its byte size is bounded."""
    if message.role not in _ROLE_FROM_PROTO:
        raise InvalidRequestError(f"Unknown tensor role {message.role}.", param="role")
    dtype = data_type_from_proto(message.dtype)
    shape = tuple(message.shape)
    if not 1 <= len(shape) <= MAX_DIMENSIONS or any(
        not 1 <= size <= MAX_TENSOR_BYTES for size in shape
    ):
        raise InvalidRequestError(
            f"A tensor must have 1 to {MAX_DIMENSIONS} dimensions of at least 1.", param="shape"
        )
    spec = TensorSpec(
        role=_ROLE_FROM_PROTO[message.role],
        dtype=dtype,
        shape=shape,
        level=message.level,
    )
    if spec.num_bytes > MAX_TENSOR_BYTES:
        raise InvalidRequestError(
            f"A tensor must have at most {MAX_TENSOR_BYTES} bytes.", param="shape"
        )
    return spec


def ref_to_proto(ref: EmbeddingRef) -> media_pb2.EmbeddingRef:
    """Return the message of ``ref``."""
    return media_pb2.EmbeddingRef(
        embedding_id=ref.embedding_id,
        fingerprint=ref.fingerprint,
        modality=_MODALITY_TO_PROTO[ref.modality],
        tensors=[tensor_spec_to_proto(spec) for spec in ref.tensors],
    )


def ref_from_proto(message: media_pb2.EmbeddingRef) -> EmbeddingRef:
    """Return the validated ref of a message."""
    if not 1 <= len(message.tensors) <= MAX_TENSORS:
        raise InvalidRequestError(
            f"An embedding must have 1 to {MAX_TENSORS} tensors.", param="tensors"
        )
    return EmbeddingRef(
        embedding_id=digest_from_proto(message.embedding_id, "embedding_id"),
        fingerprint=digest_from_proto(message.fingerprint, "fingerprint"),
        modality=modality_from_proto(message.modality),
        tensors=tuple(tensor_spec_from_proto(spec) for spec in message.tensors),
    )


def layout_to_proto(layout: MediaLayout) -> media_pb2.MediaLayout:
    """Return the message of ``layout``."""
    grid = layout.grid
    return media_pb2.MediaLayout(
        runs=[
            media_pb2.TokenRun(
                token_id=run.token_id, count=run.count, is_embedding=run.is_embedding
            )
            for run in layout.runs
        ],
        grid=media_pb2.PatchGrid(t=grid.t, h=grid.h, w=grid.w) if grid else None,
        spatial_merge_size=layout.spatial_merge_size,
        tile_ids=layout.tile_ids,
        aspect_ratio_id=layout.aspect_ratio_id,
        timestamps_s=layout.timestamps_s,
        audio_lengths=layout.audio_lengths,
        attends_both_ways=layout.attends_both_ways,
    )


def layout_from_proto(message: media_pb2.MediaLayout) -> MediaLayout:
    """Return the validated layout of a message; its token count is bounded."""
    if not 1 <= len(message.runs) <= MAX_RUNS or any(run.count < 1 for run in message.runs):
        raise InvalidRequestError(
            f"A layout must have 1 to {MAX_RUNS} runs of at least one token.", param="layout.runs"
        )
    if sum(run.count for run in message.runs) > MAX_LAYOUT_TOKENS:
        raise InvalidRequestError(
            f"A layout must have at most {MAX_LAYOUT_TOKENS} tokens.", param="layout.runs"
        )
    grid = message.grid if message.HasField("grid") else None
    if grid and (min(grid.t, grid.h, grid.w) < 1 or message.spatial_merge_size < 1):
        raise InvalidRequestError(
            "A grid must have sides and a merge size of at least 1.", param="layout.grid"
        )
    return MediaLayout(
        runs=tuple(TokenRun(run.token_id, run.count, run.is_embedding) for run in message.runs),
        grid=PatchGrid(grid.t, grid.h, grid.w) if grid else None,
        spatial_merge_size=message.spatial_merge_size,
        tile_ids=tuple(message.tile_ids),
        aspect_ratio_id=message.aspect_ratio_id,
        timestamps_s=tuple(message.timestamps_s),
        audio_lengths=tuple(message.audio_lengths),
        attends_both_ways=message.attends_both_ways,
    )


def span_to_proto(span: MediaSpan) -> generator_pb2.MediaSpan:
    """Return the message of ``span``."""
    return generator_pb2.MediaSpan(
        offset=span.offset,
        ref=ref_to_proto(span.ref),
        layout=layout_to_proto(span.layout),
        is_ready=span.is_ready,
    )


def span_from_proto(message: generator_pb2.MediaSpan) -> MediaSpan:
    """Return the validated span of a message: the layout matches the ref's spliced rows."""
    span = MediaSpan(
        offset=message.offset,
        ref=ref_from_proto(message.ref),
        layout=layout_from_proto(message.layout),
        is_ready=message.is_ready,
    )
    if span.layout.num_embedding_tokens != span.ref.num_splice_rows:
        raise InvalidRequestError(
            f"The layout has {span.layout.num_embedding_tokens} embedding tokens but the embedding"
            f" has {span.ref.num_splice_rows} rows.",
            reason="LAYOUT_MISMATCH",
            param="spans",
        )
    return span


def _is_name(value: str) -> bool:
    return value.isascii() and all(char.isalnum() or char in "._:-" for char in value)
