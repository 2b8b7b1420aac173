"""Sort the command line of ``chiasm up`` by who understands each flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.config import ConfigError, ServiceSettings
from chiasm.common.config_schema import nearest, settings_of, without_passwords

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class RoutedFlags:
    """A sorted command line.

    Attributes:
        own: Flags of ``chiasm up`` itself.
        services: Flags of each service by its name.
    """

    own: tuple[str, ...]
    services: Mapping[str, tuple[str, ...]]


class FlagRouter:
    """Knows who understands which flag.

    A flag that ``chiasm up`` does not know goes to every service that knows it; ``--SERVICE.flag``
    goes to that service alone. The first argument, if it is no flag, is the model. Every other
    argument is a value and follows its flag.
    """

    def __init__(
        self, own: type[ServiceSettings], models: Mapping[str, type[ServiceSettings]]
    ) -> None:
        """Build the router from the settings of ``chiasm up`` and of each service."""
        self._own_names = _flag_names(own) | {"config", "help"}
        self._names = {service: _flag_names(model) for service, model in models.items()}

    def route(self, argv: Sequence[str]) -> RoutedFlags:
        """Sort the command line after ``chiasm up``.

        Raises:
            ConfigError: Nobody knows a flag, or an argument is no flag's value.
        """
        own: list[str] = []
        services: dict[str, list[str]] = {service: [] for service in self._names}
        rest = list(argv)
        if rest and not rest[0].startswith("-"):
            own += ["--model", rest.pop(0)]
        while rest:
            flag, *values = self._take_flag(rest)
            takers, flag = self._takers_of(flag)
            for taker in takers:
                (services[taker] if taker else own).extend([flag, *values])
        return RoutedFlags(tuple(own), {name: tuple(flags) for name, flags in services.items()})

    def _take_flag(self, rest: list[str]) -> list[str]:
        """Remove the first flag and its value from ``rest`` and return them."""
        flag = rest.pop(0)
        if flag == "-h":
            return ["--help"]
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {without_passwords(flag)}", key=flag)
        has_value = "=" not in flag and rest and not rest[0].startswith("--")
        return [flag, rest.pop(0)] if has_value else [flag]

    def _takers_of(self, flag: str) -> tuple[list[str], str]:
        """Return who gets ``flag``, the empty name for ``chiasm up``, and its spelling there."""
        service, _, inner = flag[2:].partition(".")
        if service in self._names and inner:
            return [service], f"--{inner}"
        name = flag[2:].partition("=")[0].partition(".")[0]
        if name in self._own_names:
            return [""], flag
        takers = [service for service, names in self._names.items() if name in names]
        if not takers:
            known = {f"--{name}" for name in self._own_names.union(*self._names.values())}
            plain = flag.partition("=")[0]
            raise ConfigError(f"unknown flag {plain}", key=plain, nearest=nearest(plain, known))
        return takers, flag


def _flag_names(model: type[ServiceSettings]) -> set[str]:
    """Return every spelling of every flag of ``model``, without the dashes in front."""
    settings = settings_of(model)
    names = {setting.flag[2:] for setting in settings}
    switches = {f"no-{setting.flag[2:]}" for setting in settings if setting.is_bool}
    return names | switches | set(model.flag_aliases) | set(model.refused_flags)
