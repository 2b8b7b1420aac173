"""Read typed values out of a checkpoint's JSON configuration."""

from __future__ import annotations

from collections.abc import Mapping


class UnsupportedModelError(ValueError):
    """The checkpoint is of a family that is not served, or its configuration is incomplete."""


def read_section(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """Return the object at ``key``; raise ``UnsupportedModelError`` if there is none."""
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise UnsupportedModelError(f"The model configuration has no section {key!r}.")
    return value


def read_int(config: Mapping[str, object], *keys: str) -> int:
    """Return the first integer found under ``keys``; raise ``UnsupportedModelError`` if none is."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise UnsupportedModelError(f"The model configuration has no integer {' or '.join(keys)!r}.")
