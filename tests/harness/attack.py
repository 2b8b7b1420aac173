"""Write an attack once and spell it for REST and for gRPC."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from chiasm.v1 import chat_pb2, media_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

REST, GRPC = "rest", "grpc"
ENTRIES = (REST, GRPC)
ANSWERED = ""
DEFAULT_BUDGET_BYTES = 128 << 20

_MODALITIES = {
    "image": media_pb2.MODALITY_IMAGE,
    "video": media_pb2.MODALITY_VIDEO,
    "audio": media_pb2.MODALITY_AUDIO,
}
_DATA_TYPES = {
    "float32": media_pb2.DATA_TYPE_FLOAT32,
    "float16": media_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": media_pb2.DATA_TYPE_BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class Site:
    """Where an attack takes place.

    Attributes:
        port: Port of all servers: on 127.0.0.2, where media may be fetched, and of the canary on
            127.0.0.1 and ::1, which nobody may reach.
        secret: A file of the server that no request may have opened.
    """

    port: int
    secret: Path


@dataclass(frozen=True, slots=True)
class Part:
    """One content part in both languages."""

    rest: object
    grpc: chat_pb2.ContentPart


Parts: TypeAlias = "Part | Sequence[Part]"


@dataclass(frozen=True, slots=True)
class Attack:
    """A request that means harm, and what may come of it.

    Attributes:
        name: Name of the row.
        make: Returns the parts of the one user message.
        codes: Codes that it may be refused with; ``ANSWERED`` where an honest answer is one.
        fields: Further fields of the REST body.
        entries: Entry points that can spell it.
        budget_bytes: Memory that all services together may take for it.
    """

    name: str
    make: Callable[[Site], Parts]
    codes: frozenset[str]
    fields: Mapping[str, object] = field(default_factory=dict)
    entries: Sequence[str] = ENTRIES
    budget_bytes: int = DEFAULT_BUDGET_BYTES

    def parts(self, site: Site) -> list[Part]:
        """Return the parts of the message."""
        made = self.make(site)
        return [made] if isinstance(made, Part) else list(made)


def attack(name: str, make: Callable[[Site], Parts] | Parts, *codes: str, **more: Any) -> Attack:
    """Return a row; ``codes`` are what it may be refused with, ``more`` further attributes."""
    if callable(make):
        return Attack(name, make, frozenset(codes), **more)
    return Attack(name, lambda _: make, frozenset(codes), **more)


def text(content: str) -> Part:
    """Return a text part."""
    return Part({"type": "text", "text": content}, chat_pb2.ContentPart(text=content))


def url(address: str, modality: str = "image", **wishes: Any) -> Part:
    """Return a media item behind a URL."""
    kind = f"{modality}_url"
    return _media({"type": kind, kind: {"url": address}}, modality, wishes, url=address)


def file(data: bytes, modality: str = "image", **wishes: Any) -> Part:
    """Return a media item with its bytes: a data URL over REST, plain bytes over gRPC."""
    kind = f"{modality}_url"
    rest = {"type": kind, kind: {"url": data_url(data, modality)}}
    return _media(rest, modality, wishes, data=data)


def named(uuid: str, data: bytes | None = None, **wishes: Any) -> Part:
    """Return an image with a client's name for it, and without its bytes if there are none."""
    content = None if data is None else {"url": data_url(data, "image")}
    rest = {"type": "image_url", "image_url": content, "uuid": uuid}
    source = {} if data is None else {"data": data}
    return _media(rest, "image", wishes, uuid=uuid, **source)


def frames(files: Sequence[bytes], **wishes: Any) -> Part:
    """Return a video as a list of JPEG files: one data URL over REST, a list over gRPC."""
    address = "data:video/jpeg;base64," + ",".join(map(_b64, files))
    listed = chat_pb2.FrameList(frames=[chat_pb2.Frame(data=data) for data in files])
    rest = {"type": "video_url", "video_url": {"url": address}}
    return _media(rest, "video", wishes, frames=listed)


def tensor(
    shape: Sequence[int], data: bytes, dtype: str = "float32", grid: Sequence[int] = (1, 4, 6)
) -> Part:
    """Return a ready-made embedding, element by element."""
    rest = {
        "type": "image_embeds",
        "image_embeds": {
            "image_embeds": {"dtype": dtype, "shape": list(shape), "data": _b64(data)},
            "image_grid_thw": list(grid),
        },
    }
    message = chat_pb2.MediaTensor(
        dtype=_DATA_TYPES.get(dtype, 255),  # type: ignore[arg-type]  # one that does not exist
        shape=[side % (1 << 64) for side in shape],
        data=data,
        grid=_grid(grid),
    )
    return _media(rest, "image", {}, tensor=message)


def tensor_file(data: bytes, grid: Sequence[int] | None = (1, 4, 6)) -> Part:
    """Return a ready-made embedding in a file."""
    payload: dict[str, object] = {"image_embeds": _b64(data)}
    message = chat_pb2.TensorFile(data=data)
    if grid is not None:
        payload["image_grid_thw"] = list(grid)
        message.grid.CopyFrom(_grid(grid))
    return _media(
        {"type": "image_embeds", "image_embeds": payload}, "image", {}, tensor_file=message
    )


def data_url(data: bytes, modality: str) -> str:
    """Return a data URL; the type that it tells means nothing."""
    return f"data:{modality}/any;base64,{_b64(data)}"


def _media(rest: dict[str, Any], modality: str, wishes: Mapping[str, Any], **fields: Any) -> Part:
    options = media_pb2.ProcessingOptions(**wishes)
    media = chat_pb2.MediaPart(modality=_MODALITIES[modality], options=options, **fields)
    return Part({**rest, **wishes}, chat_pb2.ContentPart(media=media))


def _grid(sides: Sequence[int]) -> media_pb2.PatchGrid:
    t, h, w = sides
    return media_pb2.PatchGrid(t=t, h=h, w=w)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
