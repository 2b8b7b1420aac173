"""Translate ready-made embeddings in JSON: files in base64, numbers, or objects of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.data_url import decode_base64
from chiasm.v1 import chat_pb2, media_pb2

from .number_array import read_number_array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chiasm.common.limits import Limits

    from .fields import Fields

EMBEDDING_KINDS: Mapping[str, media_pb2.Modality.ValueType] = {
    "image_embeds": media_pb2.MODALITY_IMAGE,
    "video_embeds": media_pb2.MODALITY_VIDEO,
    "audio_embeds": media_pb2.MODALITY_AUDIO,
}
FILE_SCHEME = "cid:"
_GRID_KEYS = {"image_embeds": "image_grid_thw", "video_embeds": "video_grid_thw"}
_DATA_TYPES = {
    "float32": media_pb2.DATA_TYPE_FLOAT32,
    "float16": media_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": media_pb2.DATA_TYPE_BFLOAT16,
}
_MAX_GRID_SIDE = (1 << 32) - 1


class EmbeddingsReader:
    """Reads the payload of ``image_embeds``, ``video_embeds`` and ``audio_embeds`` parts.

    Accepted forms: base64, or the ``cid:`` URL, of a file that ``torch.save`` or safetensors wrote;
    nested arrays of numbers; an object ``{"dtype", "shape", "data"}`` with the elements in base64;
    an object that names the embedding and its grid, such as ``{"image_embeds": …,
    "image_grid_thw": …}``, each in one of these forms.
    """

    def __init__(self, file_of: Callable[[str, str], bytes], limits: Limits) -> None:
        """Take what payloads refer to.

        Args:
            file_of: Returns the file that a ``cid:`` URL names; takes the URL and the path of the
                field.
            limits: Bounds on embeddings.
        """
        self._file_of = file_of
        self._limits = limits

    def read(self, fields: Fields, kind: str, media: chat_pb2.MediaPart) -> None:
        """Set the source of ``media`` from the field ``kind``; ``null`` sets none.

        Raises:
            InvalidRequestError: The payload has none of the forms.
            TooLargeError: It is over its limit.
        """
        value = fields.take(kind)
        if isinstance(value, dict) and value:
            inner = fields.nested(value, fields.param(kind))
            if kind in value:
                self._read_named(inner, kind, media)
            elif "data" in value:
                self._read_typed(inner, media)
            else:
                found = ", ".join(sorted(str(name)[:32] for name in list(value)[:8]))
                raise inner.error(
                    kind,
                    f"The data should contain the fields: {{{kind}}}, but only found the"
                    f" following keys: {found}",
                )
        elif value not in (None, {}):
            self._read_plain(fields, kind, media)

    def _read_named(self, fields: Fields, kind: str, media: chat_pb2.MediaPart) -> None:
        value = fields.take(kind)
        if isinstance(value, dict):
            self._read_typed(fields.nested(value, fields.param(kind)), media)
        elif value is not None:
            self._read_plain(fields, kind, media)
        grid_key = _GRID_KEYS.get(kind)
        if grid_key is not None:
            self._read_grid(fields, grid_key, media)
        unknown = fields.untaken()
        if unknown:
            raise fields.error(unknown[0][:64], f"Unsupported modality: {unknown[0][:64]}")

    def _read_plain(self, fields: Fields, name: str, media: chat_pb2.MediaPart) -> None:
        value = fields.take(name)
        max_bytes = self._limits.max_tensor_bytes
        if isinstance(value, str):
            media.tensor_file.data = self._file(value, max_bytes, fields.param(name))
        elif isinstance(value, list):
            numbers = read_number_array(value, max_bytes, fields.param(name))
            media.tensor.dtype = media_pb2.DATA_TYPE_FLOAT32
            media.tensor.shape.extend(numbers.shape)
            media.tensor.data = numbers.data
        else:
            raise fields.wrong_type(name, "base64 of a tensor, an array of numbers or an object")

    def _read_typed(self, fields: Fields, media: chat_pb2.MediaPart) -> None:
        dtype = fields.take_str("dtype") or ""
        if dtype not in _DATA_TYPES:
            raise fields.error("dtype", f"dtype must be one of {', '.join(_DATA_TYPES)}.")
        shape = fields.take_list("shape") or []
        if not 1 <= len(shape) <= 4:
            raise fields.error("shape", "A tensor must have 1 to 4 dimensions.")
        data = fields.take_str("data")
        if data is None:
            raise fields.wrong_type("data", "base64 of the elements")
        media.tensor.dtype = _DATA_TYPES[dtype]
        media.tensor.shape.extend(_sides(shape, fields, "shape"))
        media.tensor.data = self._file(data, self._limits.max_tensor_bytes, fields.param("data"))

    def _read_grid(self, fields: Fields, name: str, media: chat_pb2.MediaPart) -> None:
        value = fields.take(name)
        holder = media.tensor if media.WhichOneof("source") == "tensor" else media.tensor_file
        if isinstance(value, list):
            sides = value[0] if len(value) == 1 and isinstance(value[0], list) else value
            if len(sides) != 3:
                raise fields.error(name, f"{name} must be [t, h, w], for one item per part.")
            t, h, w = _sides(sides, fields, name)
            holder.grid.CopyFrom(media_pb2.PatchGrid(t=t, h=h, w=w))
        elif isinstance(value, str):
            if isinstance(holder, chat_pb2.MediaTensor):
                raise fields.error(name, f"{name} must be [t, h, w] if the embedding is numbers.")
            max_bytes = self._limits.max_grid_file_bytes
            holder.grid_data = self._file(value, max_bytes, fields.param(name))
        elif value is not None:
            raise fields.wrong_type(name, "an array or base64 of a tensor")

    def _file(self, value: str, max_bytes: int, param: str) -> bytes:
        if value.startswith(FILE_SCHEME):
            return self._file_of(value, param)
        return decode_base64(value, max_bytes=max_bytes, what="The tensor", param=param)


def _sides(values: list[object], fields: Fields, name: str) -> list[int]:
    sides = [value for value in values if type(value) is int and 1 <= value <= _MAX_GRID_SIDE]
    if len(sides) != len(values):
        raise fields.error(name, f"{fields.param(name)} must hold integers of at least 1.")
    return sides
