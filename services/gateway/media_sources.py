"""What a media item may come from, besides one URL or one file: frames, ready-made embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from chiasm.common.identity import frames_digest, source_digest, tensor_digest

from .chat_request import BytesSource, UrlSource

if TYPE_CHECKING:
    from chiasm.common.media import DataType, PatchGrid


@dataclass(frozen=True, slots=True)
class FramesSource:
    """The pictures of a video, oldest first."""

    frames: tuple[UrlSource | BytesSource, ...]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A ready-made embedding: ``content`` holds its elements, little-endian, in row-major order."""

    dtype: DataType
    shape: tuple[int, ...]
    grid: PatchGrid | None
    content: BytesSource


@dataclass(frozen=True, slots=True)
class TensorFileSource:
    """A ready-made embedding in a file of ``torch.save`` or safetensors; the encoder reads it.

    Attributes:
        file: The file.
        grid_file: A second file with the patch grid; ``None``: there is none.
        grid: The patch grid, if the client told it in numbers.
    """

    file: BytesSource
    grid_file: BytesSource | None
    grid: PatchGrid | None


MediaSource: TypeAlias = UrlSource | BytesSource | FramesSource | TensorSource | TensorFileSource


def contents_of(source: MediaSource | None) -> tuple[BytesSource, ...]:
    """Return the bytes that belong to ``source``, in the order in which they are sent."""
    match source:
        case BytesSource():
            return (source,)
        case FramesSource():
            return tuple(frame for frame in source.frames if isinstance(frame, BytesSource))
        case TensorSource():
            return (source.content,)
        case TensorFileSource():
            return (source.file,) if source.grid_file is None else (source.file, source.grid_file)
        case _:
            return ()


def num_bytes_of(source: MediaSource | None) -> int:
    """Return how many bytes of ``source`` are in memory."""
    return sum(len(content.data or b"") for content in contents_of(source))


def is_whole(source: MediaSource | None) -> bool:
    """Return whether an item could be encoded now: none of its bytes was released."""
    return source is not None and all(content.data is not None for content in contents_of(source))


def digest_of(source: MediaSource | None) -> bytes | None:
    """Return the digest by which the encoder calls ``source``; ``None`` if only it can tell.

    Takes 0.15 ms per MiB, so use a thread.
    """
    match source:
        case BytesSource():
            return None if source.data is None else source_digest(source.data)
        case FramesSource():
            digests = [
                digest_of(frame) for frame in source.frames if isinstance(frame, BytesSource)
            ]
            known = [digest for digest in digests if digest is not None]
            return frames_digest(known) if len(known) == len(source.frames) else None
        case TensorSource():
            data = source.content.data
            return (
                None
                if data is None
                else tensor_digest(source.dtype, source.shape, data, source.grid)
            )
        case _:
            return None
