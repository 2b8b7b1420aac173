"""Define the bodies of the messages about ready-made tensors; see ``decode_wire.py``.

The source is a file of ``torch.save`` or safetensors, and behind it, if there is one, the file with
the patch grid. A decoded tensor is its elements, little-endian, in row-major order.
"""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass

from chiasm.encoder.decode_wire import WireError

MAX_DIMENSIONS = 4

_TASK = struct.Struct("<QII16s")
_HEADER = struct.Struct(f"<BBxx{MAX_DIMENSIONS}QIII")


class ElementType(enum.Enum):
    """Type of a tensor's elements; the value is the word for it."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"

    @property
    def num_bytes(self) -> int:
        """Bytes of one element."""
        return {"float16": 2, "bfloat16": 2, "int64": 8}.get(self.value, 4)

    @property
    def is_float(self) -> bool:
        """Whether it can be the type of an embedding."""
        return "float" in self.value


_CODES = tuple(ElementType)


@dataclass(frozen=True, slots=True)
class TensorTask:
    """What a worker is told about a file with a tensor.

    Attributes:
        max_bytes: Most bytes of the elements.
        num_file_bytes: Bytes of the first file.
        num_grid_bytes: Bytes of the file with the grid; 0: there is none.
        modality: Kind of the item, such as ``image``; tensors in the file may be named after it.
    """

    max_bytes: int
    num_file_bytes: int
    num_grid_bytes: int
    modality: str

    def pack(self) -> bytes:
        """Return the body of a request."""
        return _TASK.pack(
            self.max_bytes, self.num_file_bytes, self.num_grid_bytes, self.modality.encode()
        )

    @classmethod
    def unpack(cls, body: bytes) -> TensorTask:
        """Return the task in ``body``; raise ``WireError`` if it is none."""
        if len(body) != _TASK.size:
            raise WireError("not a task about a tensor")
        max_bytes, num_file_bytes, num_grid_bytes, modality = _TASK.unpack(body)
        return cls(max_bytes, num_file_bytes, num_grid_bytes, modality.rstrip(b"\0").decode())


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file tells of its tensor.

    Attributes:
        element_type: Type of the elements; a float type.
        shape: Dimensions, row-major; each at least 1.
        grid: Patches by time, height and width; ``None``: the file does not say.
    """

    element_type: ElementType
    shape: tuple[int, ...]
    grid: tuple[int, int, int] | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.element_type.num_bytes

    def pack(self) -> bytes:
        """Return the body of the answer to a probe."""
        padding = (0,) * (MAX_DIMENSIONS - len(self.shape))
        code = _CODES.index(self.element_type)
        return _HEADER.pack(code, len(self.shape), *self.shape, *padding, *(self.grid or (0, 0, 0)))

    @classmethod
    def unpack(cls, body: bytes) -> TensorHeader:
        """Return the header in ``body``; raise ``WireError`` if it is none."""
        if len(body) != _HEADER.size:
            raise WireError("not the header of a tensor")
        code, num_dimensions, *numbers = _HEADER.unpack(body)
        if code >= len(_CODES) or not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise WireError("not the header of a tensor")
        shape, (t, h, w) = tuple(numbers[:num_dimensions]), numbers[MAX_DIMENSIONS:]
        if min(shape) < 1:
            raise WireError("not the header of a tensor")
        return cls(_CODES[code], shape, (t, h, w) if t and h and w else None)
