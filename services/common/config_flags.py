"""Parse the command line of a service by the fields of its settings model."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, NoReturn

from chiasm.common.config_schema import ConfigError, nearest, without_passwords

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.config import ServiceSettings
    from chiasm.common.config_schema import Setting

_DOTTED = re.compile(r"--(?P<name>[a-z0-9][a-z0-9_-]*)\.(?P<key>[A-Za-z0-9_.-]+)(=(?P<value>.*))?")


class FlagParser:
    """Command line of one service: ``--name value`` for every setting, and ``--help``.

    Switches are ``--name`` and ``--no-name``. Sequences may repeat the flag; mappings may also be
    given as ``--name.key value``, and nested ones as ``--name.key.key value``.
    """

    def __init__(
        self, model: type[ServiceSettings], service: str, settings: Sequence[Setting]
    ) -> None:
        self._model = model
        self._settings = settings
        self._by_name = {setting.name: setting for setting in settings}
        self._parser = self._make_parser(service)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values given on the command line by setting name.

        Raises:
            ConfigError: A flag is unknown, refused, lacks its value or has a malformed one.
        """
        plain, dotted = self._take_dotted(list(argv))
        namespace, rest = self._parser.parse_known_args(plain)
        if rest:
            raise self._unknown(rest[0])
        values: dict[str, Any] = {}
        for name, texts in vars(namespace).items():
            if texts is not None:
                values[name] = self._parse_texts(name, texts)
        for name, pairs in dotted.items():
            values[name] = _merge(values.get(name, {}), pairs)
        return values

    def format_help(self) -> str:
        """Return what ``--help`` prints."""
        return self._parser.format_help()

    def _parse_texts(self, name: str, texts: list[str]) -> object:
        if name == "config":
            return texts[-1]
        setting = self._by_name[name]
        if not setting.is_sequence:
            return setting.parse(texts[-1])
        values: list[object] = []
        for text in texts:
            parsed = setting.parse(text)
            values.extend(parsed if isinstance(parsed, list) else [parsed])
        return values

    def _make_parser(self, service: str) -> _Parser:
        parser = _Parser(
            prog=f"chiasm {service}",
            description=(self._model.__doc__ or "").partition("\n")[0],
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=32, width=100
            ),
        )
        parser.add_argument(
            "--config",
            action="append",
            metavar="FILE",
            help=f"TOML file; the table [{service}] holds this service's settings",
        )
        groups: dict[str, Any] = {"": parser}
        aliases: dict[str, list[str]] = {}
        for alias, name in self._model.flag_aliases.items():
            aliases.setdefault(name, []).append(f"--{alias}")
        for setting in self._settings:
            if setting.group not in groups:
                groups[setting.group] = parser.add_argument_group(setting.group.replace("_", " "))
            self._add_flag(groups[setting.group], setting, aliases.get(setting.name, []), service)
        return parser

    def _add_flag(self, group: Any, setting: Setting, aliases: list[str], service: str) -> None:
        default = f"default: {setting.default_text}; " if setting.default_text else ""
        origin = f"env: CHIASM_{service.upper()}_{setting.name.upper()}"
        description = (setting.info.description or "").rstrip(".")
        shared: dict[str, Any] = {"dest": setting.name, "default": None, "action": "append"}
        kwargs: dict[str, Any] = {"help": f"{description} ({default}{origin})".replace("%", "%%")}
        flags = [setting.flag, *aliases]
        if setting.is_bool:
            group.add_argument(*flags, nargs="?", const="true", metavar="BOOL", **kwargs, **shared)
            negative = f"--no-{setting.flag[2:]}"
            shared["action"] = "append_const"
            group.add_argument(negative, const="false", help=argparse.SUPPRESS, **shared)
        else:
            metavar = setting.name.rsplit("_", 1)[-1].upper()
            group.add_argument(*flags, metavar=metavar, **kwargs, **shared)

    def _take_dotted(self, argv: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """Split ``--name.key value`` of mappings off the other arguments; keys may be nested."""
        plain: list[str] = []
        dotted: dict[str, dict[str, Any]] = {}
        rest = iter(argv)
        for argument in rest:
            match = _DOTTED.fullmatch(argument)
            name = match["name"].replace("-", "_") if match else ""
            if not match or name not in self._by_name or not self._by_name[name].is_mapping:
                plain.append(argument)
                continue
            value = match["value"] if match["value"] is not None else next(rest, None)
            if value is None:
                raise ConfigError(f"{argument} needs a value", key=argument)
            parsed = self._by_name[name].parse_member(value)
            *outer, last = match["key"].split(".")
            target = dotted.setdefault(name, {})
            for key in outer:
                target = target.setdefault(key, {})
                if not isinstance(target, dict):
                    raise ConfigError(f"{argument} is given twice", key=argument)
            target[last] = parsed
        return plain, dotted

    def _unknown(self, argument: str) -> ConfigError:
        flag, _, value = argument.partition("=")
        if flag.lstrip("-") in self._model.refused_flags:
            return ConfigError(
                f"{flag} is refused: {self._model.refused_flags[flag.lstrip('-')]}", key=flag
            )
        known = [setting.flag for setting in self._settings]
        known += [f"--{alias}" for alias in self._model.flag_aliases]
        kind = "unknown flag" if flag.startswith("-") else "unexpected argument"
        return ConfigError(
            f"{kind} {without_passwords(flag)}",
            key=flag,
            value=value or None,
            nearest=nearest(flag, known),
        )


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return both mappings in one, member by member; where both have a value, the second's."""
    merged = {**first, **second}
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict) and isinstance(second[key], dict):
            merged[key] = _merge(first[key], second[key])
    return merged


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises ``ConfigError`` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, key=message)
