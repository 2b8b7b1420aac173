"""Interpret the part of pickle in which ``torch.save`` describes dense tensors, and no more.

The opcodes build integers, short strings, tuples, dictionaries and tensors; nothing is imported,
called or looked up by name. What else a file asks for ends the reading::

    GLOBAL     one of the names below, which stay names
    BINPERSID  ("storage", a storage type, key, location, number of elements)
    REDUCE     torch._utils._rebuild_tensor_v2 and _rebuild_parameter; OrderedDict of nothing
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.encoder.wire_tensor import ElementType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_STORAGE_TYPES = {
    "torch FloatStorage": ElementType.FLOAT32,
    "torch HalfStorage": ElementType.FLOAT16,
    "torch BFloat16Storage": ElementType.BFLOAT16,
    "torch LongStorage": ElementType.INT64,
    "torch IntStorage": ElementType.INT32,
}
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_KNOWN_NAMES = {*_STORAGE_TYPES, _REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT}
_MAX_TEXT_BYTES = 256
_MAX_LONG_BYTES = 8


class TensorFileError(Exception):
    """A file is not one of dense tensors; the text, which is our own, says what is wrong."""


@dataclass(frozen=True, slots=True)
class StorageRef:
    """Names the elements of an archive that tensors are views of."""

    element_type: ElementType
    key: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class TensorView:
    """A strided view of a storage, as the file describes it; its bounds are not checked."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the file refers to."""

    text: str


class _Mark:
    """Stands on the stack where a collection begins."""


def read_torch_objects(data: bytes) -> Mapping[str, TensorView]:
    """Return the tensors that a ``data.pkl`` describes, by name; a lone one is called ``""``.

    Takes memory and time in proportion to ``data``.

    Raises:
        TensorFileError: It describes something else.
    """
    saved = _Interpreter(data).run()
    if isinstance(saved, TensorView):
        return {"": saved}
    if not isinstance(saved, dict) or not saved:
        raise TensorFileError("it must hold a tensor or tensors by name")
    tensors: dict[str, TensorView] = {}
    for name, value in saved.items():
        if not isinstance(value, TensorView):
            raise TensorFileError("it must hold nothing but tensors")
        tensors[name] = value
    return tensors


class _Interpreter:
    """Runs the opcodes over a stack of harmless values."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}
        self._actions: dict[int, Callable[[], None]] = {
            0x80: self._protocol,
            ord("("): lambda: self._push(_Mark()),
            ord("N"): lambda: self._push(None),
            0x88: lambda: self._push(True),
            0x89: lambda: self._push(False),
            ord("K"): lambda: self._push(self._unpack("<B")),
            ord("M"): lambda: self._push(self._unpack("<H")),
            ord("J"): lambda: self._push(self._unpack("<i")),
            0x8A: self._long,
            ord("X"): self._text,
            ord(")"): lambda: self._push(()),
            0x85: lambda: self._tuple_of(1),
            0x86: lambda: self._tuple_of(2),
            0x87: lambda: self._tuple_of(3),
            ord("t"): lambda: self._push(tuple(self._pop_to_mark())),
            ord("}"): lambda: self._push({}),
            ord("s"): lambda: self._set_items(self._pop_many(2)),
            ord("u"): lambda: self._set_items(self._pop_to_mark()),
            ord("q"): lambda: self._remember(self._unpack("<B")),
            ord("r"): lambda: self._remember(self._unpack("<I")),
            ord("h"): lambda: self._recall(self._unpack("<B")),
            ord("j"): lambda: self._recall(self._unpack("<I")),
            ord("c"): self._global,
            ord("Q"): lambda: self._push(_storage(self._pop())),
            ord("R"): self._reduce,
        }

    def run(self) -> object:
        while (code := self._take(1)[0]) != ord("."):
            action = self._actions.get(code)
            if action is None:
                raise TensorFileError("it holds something else than dense tensors")
            action()
        if len(self._stack) != 1:
            raise TensorFileError("its description is broken")
        return self._stack[0]

    def _take(self, num_bytes: int) -> bytes:
        taken = self._data[self._position : self._position + num_bytes]
        if len(taken) != num_bytes:
            raise TensorFileError("its description breaks off")
        self._position += num_bytes
        return taken

    def _unpack(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(value)

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position, self._position + _MAX_TEXT_BYTES)
        if end < 0:
            raise TensorFileError("its description is broken")
        line = self._data[self._position : end]
        self._position = end + 1
        return line.decode("ascii", "replace")

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise TensorFileError("its description is broken")
        return self._stack.pop()

    def _pop_many(self, count: int) -> list[object]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[object]:
        values: list[object] = []
        while self._stack and not isinstance(self._stack[-1], _Mark):
            values.append(self._stack.pop())
        if not self._stack:
            raise TensorFileError("its description is broken")
        self._stack.pop()
        return values[::-1]

    def _protocol(self) -> None:
        if self._take(1) != b"\x02":
            raise TensorFileError("its description is of an unknown version")

    def _long(self) -> None:
        num_bytes = self._unpack("<B")
        if num_bytes > _MAX_LONG_BYTES:
            raise TensorFileError("its description has a number out of range")
        self._push(int.from_bytes(self._take(num_bytes), "little", signed=True))

    def _text(self) -> None:
        num_bytes = self._unpack("<I")
        if num_bytes > _MAX_TEXT_BYTES:
            raise TensorFileError("its description has too long a name")
        self._push(self._take(num_bytes).decode("utf-8", "replace"))

    def _tuple_of(self, count: int) -> None:
        self._push(tuple(self._pop_many(count)))

    def _set_items(self, values: list[object]) -> None:
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, dict) or len(values) % 2:
            raise TensorFileError("its description is broken")
        for name, value in zip(values[::2], values[1::2], strict=True):
            # Nothing but strings is hashed: tuples of tuples could take for ever.
            if not isinstance(name, str):
                raise TensorFileError("tensors must have strings as names")
            target[name] = value

    def _remember(self, index: int) -> None:
        if not self._stack:
            raise TensorFileError("its description is broken")
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise TensorFileError("its description is broken")
        self._push(self._memo[index])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        text = f"{module} {name}"
        if text not in _KNOWN_NAMES:
            raise TensorFileError("it holds something else than dense float tensors")
        self._push(_Name(text))

    def _reduce(self) -> None:
        function, arguments = self._pop_many(2)
        if function == _Name(_ORDERED_DICT) and arguments == ():
            self._push({})
        elif function == _Name(_REBUILD_TENSOR):
            self._push(_tensor(arguments))
        elif function == _Name(_REBUILD_PARAMETER):
            self._push(_parameter(arguments))
        else:
            raise TensorFileError("it holds something else than dense tensors")


def _storage(description: object) -> StorageRef:
    match description:
        case ("storage", _Name(text), str(key), str(_), int(count)) if (
            text in _STORAGE_TYPES and count >= 0
        ):
            return StorageRef(_STORAGE_TYPES[text], key, count)
        case _:
            raise TensorFileError("its description of a storage is broken")


def _tensor(arguments: object) -> TensorView:
    match arguments:
        case (StorageRef() as storage, int(offset), tuple(shape), tuple(strides), *_) if (
            _are_integers(shape) and _are_integers(strides) and len(shape) == len(strides)
        ):
            return TensorView(storage, offset, shape, strides)
        case _:
            raise TensorFileError("its description of a tensor is broken")


def _parameter(arguments: object) -> TensorView:
    match arguments:
        case (TensorView() as tensor, *_):
            return tensor
        case _:
            raise TensorFileError("its description of a parameter is broken")


def _are_integers(values: tuple[object, ...]) -> bool:
    return all(type(value) is int for value in values)
