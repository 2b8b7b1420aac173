"""Describe the settings of a model: names, groups, types; parse their text forms."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic_core import PydanticUndefined

if typing.TYPE_CHECKING:
    from pydantic.fields import FieldInfo


# Whatever may be userinfo, however misspelled the URL around it is, and redis-py's other way.
_USERINFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)?.*:.*@", re.DOTALL | re.IGNORECASE)
_PASSWORD = re.compile(r"(?P<name>[?&](?:username|password)=)[^&]*", re.IGNORECASE)


class ConfigError(Exception):
    """A setting is unknown or wrong; the service does not start. Its text shows no password.

    Attributes:
        key: Name of the setting as the user wrote it.
        value: Value as the user wrote it; ``None`` if there is none.
        nearest: Known name that an unknown ``key`` may have meant.
    """

    def __init__(
        self, message: str, *, key: str, value: object = None, nearest: str | None = None
    ) -> None:
        got = f" (got {without_passwords(value)!r})" if value is not None else ""
        hint = f"; did you mean {nearest}?" if nearest else ""
        super().__init__(f"{message}{got}{hint}")
        self.key = key
        self.value = value
        self.nearest = nearest


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a settings model, or of one of its groups.

    Attributes:
        name: Name of the field; unique within the service.
        group: Field of the group that holds it; empty at the top.
        info: Type, default and description.
    """

    name: str
    group: str
    info: FieldInfo

    @property
    def flag(self) -> str:
        """Spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_bool(self) -> bool:
        """Whether the setting is a switch."""
        return bool in self._types()

    @property
    def is_sequence(self) -> bool:
        """Whether the setting holds several values."""
        return any(kind in (list, tuple, set, frozenset) for kind in self._types())

    @property
    def is_mapping(self) -> bool:
        """Whether the setting maps names to values."""
        return any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in self._types())

    @property
    def is_secret(self) -> bool:
        """Whether the value must not be shown."""
        return any(kind in (SecretStr, SecretBytes) for kind in self._types(deep=True))

    @property
    def default_text(self) -> str:
        """Default as shown in help and documentation; empty if the setting is required."""
        default = self.info.get_default(call_default_factory=True, validated_data={})
        if default is PydanticUndefined:
            return ""
        if isinstance(default, bool):
            return str(default).lower()
        if isinstance(default, list | tuple | set | frozenset):
            return ",".join(map(str, default))
        if isinstance(default, Mapping):
            return json.dumps(dict(default))
        return "" if default is None else str(getattr(default, "value", default))

    def value_in(self, model: BaseModel) -> object:
        """Return this setting's value in a built model."""
        holder = getattr(model, self.group) if self.group else model
        return getattr(holder, self.name)

    def parse(self, text: str) -> object:
        """Return the value that ``text`` from a flag or the environment stands for.

        Sequences are JSON or separated by commas, mappings JSON or ``a=1,b=2``; everything else
        stays text and is converted by the model.
        """
        if self.is_mapping:
            return self._parse_mapping(text)
        if self.is_sequence:
            if text.startswith("["):
                return self._parse_json(text)
            # An empty secret is kept, to be refused: dropped, it could leave a door open.
            return [part.strip() for part in text.split(",") if part.strip() or self.is_secret]
        return None if not text and type(None) in self._types() else text

    def parse_member(self, text: str) -> object:
        """Return the value of one key of a mapping: JSON if it is an array or an object."""
        return self._parse_json(text) if text.startswith(("[", "{")) else text

    def _parse_mapping(self, text: str) -> object:
        if text.startswith("{"):
            return self._parse_json(text)
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if any(not sign for _, sign, _ in pairs):
            raise ConfigError(
                f"{self.flag} must be a JSON object or name=value,name=value",
                key=self.name,
                value=text,
            )
        return {key.strip(): value.strip() for key, _, value in pairs}

    def _parse_json(self, text: str) -> object:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{self.flag} is not valid JSON: {error}", key=self.name, value=text
            ) from error

    def _types(self, *, deep: bool = False) -> set[Any]:
        """Return the members of the annotation's union, with type arguments if ``deep``."""
        found: set[Any] = set()
        pending: list[Any] = [self.info.annotation]
        while pending:
            kind = pending.pop()
            origin = typing.get_origin(kind)
            if origin in (typing.Union, types.UnionType) or (deep and origin is not None):
                pending.extend(typing.get_args(kind))
            found.add(origin or kind)
        return found


def settings_of(model: type[BaseModel]) -> list[Setting]:
    """Return every setting of ``model`` in the order of its fields, groups unfolded."""
    found: list[Setting] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.extend(Setting(leaf, name, sub) for leaf, sub in kind.model_fields.items())
        else:
            found.append(Setting(name, "", info))
    names = [setting.name for setting in found]
    assert len(set(names)) == len(names), f"{model.__name__} has two settings of one name"
    return found


def without_passwords(value: object) -> object:
    """Return ``value`` with the userinfo of the URLs in it replaced by asterisks."""
    if isinstance(value, str):
        shown = _USERINFO.sub(lambda match: f"{match['scheme'] or ''}***@", value)
        return _PASSWORD.sub(r"\g<name>***", shown)
    if isinstance(value, list | tuple):
        return [without_passwords(part) for part in value]
    if isinstance(value, Mapping):
        return {key: without_passwords(part) for key, part in value.items()}
    return value


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known name most like ``key``; ``None`` if none is alike."""
    return next(iter(difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)), None)
