"""What callers ask of the encoder, and what it tells them, free of protobuf."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from chiasm.common.media import (
        CacheStatus,
        DataType,
        EmbeddingRef,
        MediaLayout,
        Modality,
        PatchGrid,
        Placeholder,
        ProcessingOptions,
        RequestContext,
    )


class Delivery(enum.Enum):
    """Where an embedding goes."""

    STORE = "store"
    """Into the embedding store; inline only if the store cannot take it."""
    INLINE = "inline"
    """Back to the caller in chunks."""


@dataclass(frozen=True, slots=True)
class UrlSource:
    """An item behind an http, https, data or file URL."""

    url: str


@dataclass(frozen=True, slots=True)
class BytesSource:
    """An item whose ``num_bytes`` bytes come as ``chunks``."""

    num_bytes: int
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A ready-made embedding whose elements come as ``chunks``, little-endian, row-major."""

    dtype: DataType
    shape: tuple[int, ...]
    grid: PatchGrid | None
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class TensorFileSource:
    """A ready-made embedding in a file that comes as ``chunks``.

    Attributes:
        num_bytes: Bytes of the file.
        num_grid_bytes: Bytes of a second file behind it, which holds the patch grid; 0: none.
        grid: The patch grid, if the caller knows it.
        chunks: The bytes.
    """

    num_bytes: int
    num_grid_bytes: int
    grid: PatchGrid | None
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class FramesSource:
    """A video that comes as pictures, oldest first.

    Attributes:
        frames: Where each picture is; a number is how many bytes of ``chunks`` it takes.
        chunks: The bytes of the pictures that are sent, one after another.
    """

    frames: tuple[UrlSource | int, ...]
    chunks: AsyncIterator[bytes]


FileSource: TypeAlias = UrlSource | BytesSource
Source: TypeAlias = FileSource | FramesSource | TensorSource | TensorFileSource


@dataclass(frozen=True, slots=True)
class EncodeCommand:
    """One item to encode or to plan.

    Attributes:
        context: Caller and request.
        modality: Kind of the item.
        uuid: Client's name for the item; empty for none.
        options: Preprocessing wishes, as they came.
        delivery: Where the embedding goes.
        source: The item; ``None`` for null media, which only its uuid names.
    """

    context: RequestContext
    modality: Modality
    uuid: str
    options: ProcessingOptions
    delivery: Delivery
    source: Source | None


@dataclass(frozen=True, slots=True)
class ItemEstimate:
    """What an item would become.

    Attributes:
        layout: How it stands in the prompt.
        num_pixels: Pixels after resizing, before any crop; 0 if it is stored.
        num_queue_pixels: Pixels it would be charged in the queue; 0 if it is stored.
    """

    layout: MediaLayout
    num_pixels: int = 0
    num_queue_pixels: int = 0


@dataclass(frozen=True, slots=True)
class ItemKey:
    """What names a stored item: exactly one of ``uuid`` and ``source_digest`` is set."""

    context: RequestContext
    modality: Modality
    options: ProcessingOptions
    uuid: str = ""
    source_digest: bytes | None = None


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Seconds per stage; 0 for stages that did not run."""

    fetch_s: float = 0.0
    decode_s: float = 0.0
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    store_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ItemPlanned:
    """The identity and layout of the item are known."""

    ref: EmbeddingRef
    layout: MediaLayout
    cache_status: CacheStatus


@dataclass(frozen=True, slots=True)
class ItemChunk:
    """A piece of one tensor of the embedding, which travels inline."""

    embedding_id: bytes
    tensor_index: int
    offset: int
    data: memoryview
    is_last: bool


@dataclass(frozen=True, slots=True)
class ItemReady:
    """The embedding is in the store, or all its chunks were sent."""

    cache_status: CacheStatus
    num_bytes: int
    timings: StageTimings


EncodeEvent: TypeAlias = ItemPlanned | ItemChunk | ItemReady


@dataclass(frozen=True, slots=True)
class EncoderDescription:
    """What an encoder is; see ``GetEncoderInfoResponse``."""

    model: str
    fingerprint: bytes
    placeholders: Mapping[Modality, Placeholder]
    hidden_size: int
    num_deepstack_levels: int
    data_type: DataType
    max_source_bytes: int
    max_pixels: int
