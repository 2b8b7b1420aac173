"""Turn nested JSON arrays of numbers into the bytes of a tensor."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import check_size

_MAX_DIMENSIONS = 4
_NUMBER_TYPES = {int, float}
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class NumberArray:
    """A dense array: ``data`` holds its elements as little-endian float32, row-major."""

    shape: tuple[int, ...]
    data: bytes


def read_number_array(values: list[object], max_bytes: int, param: str) -> NumberArray:
    """Return the dense array that nested lists of numbers stand for.

    Args:
        values: Lists of equal length in up to 4 levels; the innermost hold numbers.
        max_bytes: Most bytes of the array.
        param: Path of the field, for errors.

    Raises:
        InvalidRequestError: The lists are ragged, empty or too deep, or hold something else.
        TooLargeError: The array is over ``max_bytes``.
    """
    shape: list[int] = []
    level: list[list[object]] = [values]
    while True:
        rows = _rows_of_equal_length(level, param)
        shape.append(len(rows[0]))
        num_elements = len(rows) * len(rows[0])
        check_size(num_elements * _FLOAT32_BYTES, max_bytes, "bytes of a tensor", param)
        kinds = set().union(*({type(value) for value in row} for row in rows))
        if kinds != {list}:
            break
        if len(shape) == _MAX_DIMENSIONS:
            raise _wrong(f"must have at most {_MAX_DIMENSIONS} dimensions", param)
        level = [row for outer in rows for row in outer if isinstance(row, list)]
    if not kinds <= _NUMBER_TYPES:
        raise _wrong("must hold numbers only", param)
    return NumberArray(tuple(shape), _to_bytes(rows, param))


def _rows_of_equal_length(rows: list[list[object]], param: str) -> list[list[object]]:
    if not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise _wrong("must be a dense array: lists of equal length, none empty", param)
    return rows


def _to_bytes(rows: list[list[object]], param: str) -> bytes:
    elements = array("f")
    try:
        for row in rows:
            elements.extend(array("f", row))  # type: ignore[arg-type] # numbers, as was checked
    except OverflowError:
        raise _wrong("must hold numbers within the range of float32", param) from None
    if sys.byteorder == "big":
        elements.byteswap()
    return elements.tobytes()


def _wrong(what: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {what}.", param=param)
