"""Take typed fields out of a JSON object and remember which ones nobody asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TYPE_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


class Fields:
    """The fields of one JSON object; ``null`` counts as absent.

    Every ``take_*`` raises ``InvalidRequestError`` naming the field if its type is wrong.
    """

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        """Wrap an object.

        Args:
            values: The object.
            path: Path of the object in the request, for errors; empty for the request itself.
        """
        self._values = values
        self._path = path
        self._taken: set[str] = set()
        self._nested: list[Fields] = []

    def param(self, name: str) -> str:
        """Return the path of the field ``name``."""
        return f"{self._path}.{name}" if self._path else name

    def has(self, name: str) -> bool:
        """Return whether the field was given, even as ``null``."""
        return name in self._values

    def untaken(self) -> list[str]:
        """Return the names of fields with a value that were never taken, in their order."""
        return [
            name
            for name, value in self._values.items()
            if name not in self._taken and value is not None
        ]

    def untaken_paths(self) -> Iterator[str]:
        """Yield the paths of untaken fields: first of this object, then of those inside of it."""
        yield from map(self.param, self.untaken())
        for inner in self._nested:
            yield from inner.untaken_paths()

    def nested(self, values: Mapping[str, object], path: str) -> Fields:
        """Wrap an object that lies inside of this one, at ``path`` in the request."""
        inner = Fields(values, path)
        self._nested.append(inner)
        return inner

    def take(self, name: str) -> object:
        """Return the value of a field, ``None`` if absent."""
        self._taken.add(name)
        return self._values.get(name)

    def take_bool(self, name: str) -> bool | None:
        """Return a boolean."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong_type(name, "a boolean")
        return value

    def take_str(self, name: str) -> str | None:
        """Return a string."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong_type(name, "a string")
        return value

    def take_number(self, name: str) -> float | None:
        """Return a number; integers are numbers, booleans are not."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong_type(name, "a number")
        return float(value)

    def take_int(self, name: str) -> int | None:
        """Return an integer."""
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.wrong_type(name, "an integer")
        return value

    def take_list(self, name: str) -> list[object] | None:
        """Return an array."""
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong_type(name, "an array")
        return value

    def take_object(self, name: str) -> Mapping[str, object] | None:
        """Return an object."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong_type(name, "an object")
        return value

    def take_fields(self, name: str) -> Fields | None:
        """Return an object, wrapped as one inside of this one."""
        value = self.take_object(name)
        return None if value is None else self.nested(value, self.param(name))

    def take_int_within(self, name: str, low: int, high: int) -> int | None:
        """Return an integer between ``low`` and ``high``."""
        value = self.take_int(name)
        if value is not None and not low <= value <= high:
            raise self.error(name, f"{name} must be between {low} and {high}, got {value}.")
        return value

    def error(self, name: str, message: str) -> InvalidRequestError:
        """Return an error about the field ``name``."""
        return InvalidRequestError(message, param=self.param(name))

    def wrong_type(self, name: str, wanted: str) -> InvalidRequestError:
        """Return the error for a field that is not ``wanted``."""
        got = type_name(self._values.get(name))
        return self.error(name, f"{self.param(name)} must be {wanted}, got {got}.")


def type_name(value: object) -> str:
    """Return the JSON type of ``value`` with its article."""
    return _TYPE_NAMES.get(type(value), "something else")
