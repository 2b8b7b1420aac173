"""Read dense tensors out of files of ``torch.save`` and safetensors without running anything.

A file of ``torch.save`` is a zip archive, all entries stored as they are::

    archive/data.pkl    what was saved: a tensor or tensors by name (``torch_objects.py``)
    archive/data/0      elements of the first storage, of which tensors are strided views
    archive/byteorder   "little"

A safetensors file is the length of a JSON header (8 bytes), the header, and the elements.

Sizes are checked before anything is allocated: compressed entries are refused, and a tensor never
has more elements than its storage. Every error is a ``TensorFileError`` whose text is our own.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from chiasm.encoder.torch_objects import TensorFileError, TensorView, read_torch_objects
from chiasm.encoder.wire_tensor import MAX_DIMENSIONS, ElementType

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_ZIP_MAGIC = b"PK\x03\x04"
_MAX_DIRECTORY_BYTES = 1 << 17
_MAX_PICKLE_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 16
_MAX_SIDE = 1 << 40
_LOCAL_HEADER_BYTES = 30
_IS_ENCRYPTED = 0x1
_FORMATS: Mapping[int, Literal["H", "I", "Q"]] = {2: "H", 4: "I", 8: "Q"}
_SAFETENSORS_TYPES = {
    "F32": ElementType.FLOAT32,
    "F16": ElementType.FLOAT16,
    "BF16": ElementType.BFLOAT16,
    "I64": ElementType.INT64,
    "I32": ElementType.INT32,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose elements lie within ``storage``, as was checked.

    Attributes:
        element_type: Type of the elements.
        shape: Dimensions; each at least 1.
        strides: Elements from one index of a dimension to the next.
        offset: Element of the storage at which the tensor begins.
        storage: Bytes of all elements, little-endian.
    """

    element_type: ElementType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: memoryview

    def rows(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes of the tensor in row-major order, in pieces."""
        size = self.element_type.num_bytes
        if self.strides == _dense_strides(self.shape):
            start = self.offset * size
            yield self.storage[start : start + math.prod(self.shape) * size]
            return
        elements = self.storage.cast(_FORMATS[size])
        *outer, columns = self.shape
        *outer_strides, step = self.strides
        for indices in product(*map(range, outer)):
            start = self.offset + sum(
                index * stride for index, stride in zip(indices, outer_strides, strict=True)
            )
            yield elements[start : start + (columns - 1) * step + 1 : step].tobytes()


def read_tensor_file(data: bytes) -> Mapping[str, StoredTensor]:
    """Return the tensors of a file by name; one that has no name is called ``""``.

    Raises:
        TensorFileError: It is no such file, or holds something else than dense tensors.
    """
    if data.startswith(_ZIP_MAGIC):
        return _read_torch_file(data)
    return _read_safetensors(data)


def _read_torch_file(data: bytes) -> Mapping[str, StoredTensor]:
    entries = _entries(data)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TensorFileError("the archive is not one that torch.save wrote")
    prefix = pickles[0].removesuffix("data.pkl")
    if entries.get(f"{prefix}byteorder", b"little") != b"little":
        raise TensorFileError("the tensors are not little-endian")
    if len(entries[pickles[0]]) > _MAX_PICKLE_BYTES:
        raise TensorFileError("the archive describes too many objects")
    views = read_torch_objects(bytes(entries[pickles[0]]))
    return {name: _stored(view, entries, prefix) for name, view in views.items()}


def _entries(data: bytes) -> Mapping[str, memoryview]:
    """Return the contents of the archive's entries; nothing is copied."""
    try:
        directory = zipfile.ZipFile(_BoundedReader(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise TensorFileError("the archive is broken") from error
    entries: dict[str, memoryview] = {}
    for entry in directory:
        is_plain = entry.compress_type == zipfile.ZIP_STORED
        if not is_plain or entry.flag_bits & _IS_ENCRYPTED or entry.filename in entries:
            raise TensorFileError("the archive has entries that torch.save does not write")
        head = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER_BYTES]
        if len(head) != _LOCAL_HEADER_BYTES or not head.startswith(_ZIP_MAGIC):
            raise TensorFileError("the archive is broken")
        name_bytes = int.from_bytes(head[26:28], "little")
        extra_bytes = int.from_bytes(head[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        content = memoryview(data)[start : start + entry.file_size]
        if len(content) != entry.file_size:
            raise TensorFileError("the archive is truncated")
        entries[entry.filename] = content
    return entries


class _BoundedReader(io.BytesIO):
    """Lets ``ZipFile`` read the archive's directory, which is small, and nothing else."""

    def read(self, size: int | None = -1, /) -> bytes:
        rest = len(self.getbuffer()) - self.tell()
        if (rest if size is None or size < 0 else size) > _MAX_DIRECTORY_BYTES:
            raise ValueError("the directory is too large")
        return super().read(size)


def _stored(view: TensorView, entries: Mapping[str, memoryview], prefix: str) -> StoredTensor:
    storage = entries.get(f"{prefix}data/{view.storage.key}")
    size = view.storage.element_type.num_bytes
    if storage is None or len(storage) != view.storage.num_elements * size:
        raise TensorFileError("a storage of the archive is missing or has another size")
    _check_shape(view.shape)
    num_elements = view.storage.num_elements
    sides = zip(view.shape, view.strides, strict=True)
    reach = view.offset + sum((side - 1) * stride for side, stride in sides)
    has_repeats = any(
        stride < 1 for side, stride in zip(view.shape, view.strides, strict=True) if side > 1
    )
    if has_repeats or view.offset < 0 or reach >= num_elements:
        raise TensorFileError("a tensor reaches beyond its storage or repeats elements")
    if math.prod(view.shape) > num_elements:
        raise TensorFileError("a tensor has more elements than its storage")
    # The stride of a side of 1 is never used; torch writes anything there.
    dense = _dense_strides(view.shape)
    strides = tuple(
        stride if side > 1 else own
        for side, stride, own in zip(view.shape, view.strides, dense, strict=True)
    )
    return StoredTensor(view.storage.element_type, view.shape, strides, view.offset, storage)


def _read_safetensors(data: bytes) -> Mapping[str, StoredTensor]:
    num_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= num_bytes <= _MAX_HEADER_BYTES:
        raise TensorFileError("it is neither a file of torch.save (zip form) nor of safetensors")
    try:
        header = json.loads(data[8 : 8 + num_bytes])
        elements = memoryview(data)[8 + num_bytes :]
        return {
            name: _safe_tensor(info, elements)
            for name, info in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TensorFileError("the header of the safetensors file is broken") from error


def _safe_tensor(info: Mapping[str, object], elements: memoryview) -> StoredTensor:
    shape, offsets = _integers(info["shape"]), _integers(info["data_offsets"])
    kind = _SAFETENSORS_TYPES.get(str(info["dtype"]))
    if kind is None:
        raise TensorFileError("only float32, float16 and bfloat16 tensors are read")
    _check_shape(shape)
    start, end = offsets
    if not 0 <= start <= end <= len(elements):
        raise TensorFileError("a tensor reaches beyond its file")
    if end - start != math.prod(shape) * kind.num_bytes:
        raise TensorFileError("a tensor's shape does not fit its bytes")
    return StoredTensor(kind, shape, _dense_strides(shape), 0, elements[start:end])


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError("not a list of integers")
    return tuple(values)


def _check_shape(shape: Sequence[int]) -> None:
    if not 1 <= len(shape) <= MAX_DIMENSIONS or any(not 1 <= side <= _MAX_SIDE for side in shape):
        raise TensorFileError(f"a tensor must have 1 to {MAX_DIMENSIONS} sides of at least 1")


def _dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
