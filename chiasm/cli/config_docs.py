"""Write the documentation of all settings from the models that define them."""

from __future__ import annotations

import types
import typing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.cli.up_settings import SERVICES, UpSettings, settings_model
from chiasm.common.config_schema import settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chiasm.common.config import ServiceSettings
    from chiasm.common.config_schema import Setting

_MARKDOWN_HEAD = """\
# Configuration

Made by `make docs` from the settings models; do not edit.

Every setting has a flag, a key in the TOML file given by `--config`, and an environment variable.
A flag wins over the variable, the variable over the file, the file over the default. An unknown key
stops the start and names the nearest known one. `chiasm up` hands flags that it does not know to
every service that knows them; `--SERVICE.flag` reaches that service alone.
"""
_TOML_HEAD = """\
# Every setting with its default; made by `make docs`, do not edit.
# Copy what you change and start with `--config FILE`. Settings marked "required" have no default.
"""
_QUOTED = (str, Path, Enum)


def markdown() -> str:
    """Return ``docs/configuration.md``."""
    parts = [_MARKDOWN_HEAD]
    for service, model in _models():
        parts.append(f"\n## `chiasm {service}`\n\n{_first_line(model)}\n")
        group = None
        for setting in settings_of(model):
            if setting.group != group:
                group = setting.group
                title = f"\n### {_group_title(model, group)}\n" if group else ""
                parts.append(
                    f"{title}\n| flag | default | variable | meaning |\n|---|---|---|---|\n"
                )
            parts.append(_row(service, setting))
        parts += _aliases(model)
    return "".join(parts)


def example_toml() -> str:
    """Return ``config.example.toml``."""
    parts = [_TOML_HEAD]
    for service, model in _models():
        parts.append(f"\n[{service}]\n")
        for setting in settings_of(model):
            default = _toml_default(setting)
            value = default if default is not None else "required" if _is_required(setting) else ""
            parts.append(f"# {_sentence(setting)}\n# {setting.name} = {value}".rstrip() + "\n")
    return "".join(parts)


def _models() -> Iterator[tuple[str, type[ServiceSettings]]]:
    yield "up", UpSettings
    for service in SERVICES:
        yield service, settings_model(service)


def _first_line(model: type) -> str:
    return (model.__doc__ or "").partition("\n")[0]


def _group_title(model: type[ServiceSettings], group: str) -> str:
    kind = model.model_fields[group].annotation
    assert isinstance(kind, type), "a group is a model"
    return _first_line(kind).rstrip(".")


def _row(service: str, setting: Setting) -> str:
    default = f"`{setting.default_text}`" if setting.default_text else ""
    if _is_required(setting):
        default = "required"
    variable = f"`CHIASM_{service.upper()}_{setting.name.upper()}`"
    cells = (f"`{setting.flag}`", default, variable, f"{_sentence(setting)}{_choices(setting)}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _aliases(model: type[ServiceSettings]) -> list[str]:
    """Return the lines about other spellings, if there are any."""
    flags = [
        f"`--{alias}` for `--{name.replace('_', '-')}`"
        for alias, name in sorted(model.flag_aliases.items())
    ]
    variables = [
        f"`{alias}` for `--{name.replace('_', '-')}`"
        for alias, name in sorted(model.env_aliases.items())
    ]
    variables += [
        f"`{switch}=0` for `--{name.replace('_', '-')} {text}`"
        for switch, (name, text) in sorted(model.env_off_switches.items())
    ]
    refused = [f"`--{flag}`: {why}" for flag, why in sorted(model.refused_flags.items())]
    lines = [
        ("Also accepted: ", flags),
        ("Variables also read: ", variables),
        ("Refused: ", refused),
    ]
    return [f"\n{head}{'; '.join(items)}.\n" for head, items in lines if items]


def _sentence(setting: Setting) -> str:
    return (setting.info.description or "").rstrip(".") + "."


def _choices(setting: Setting) -> str:
    """Return the values that a setting may have, if they are few."""
    kind = setting.info.annotation
    members = typing.get_args(kind) if _is_union(kind) else (kind,)
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            return f" One of {', '.join(f'`{value}`' for value in typing.get_args(member))}."
    return ""


def _is_union(kind: object) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_required(setting: Setting) -> bool:
    return setting.info.is_required()


def _toml_default(setting: Setting) -> str | None:
    """Return the default as TOML; ``None`` if there is none to write."""
    if _is_required(setting):
        return None
    value = setting.info.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(f'"{part}"' for part in value) + "]"
    return f'"{setting.default_text}"' if isinstance(value, _QUOTED) else str(value)
