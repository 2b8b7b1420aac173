"""Read a service's settings: default < TOML file < environment < flag.

A service declares one frozen ``ServiceSettings`` subclass; flags, environment names and ``--help``
follow from its fields. Fields of sub-models (groups) are addressed by their own names, which must
therefore be unique within a service.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from chiasm.common.config_flags import FlagParser
from chiasm.common.config_schema import (
    ConfigError,
    Setting,
    nearest,
    settings_of,
    without_passwords,
)

__all__ = [
    "ConfigError",
    "RedisUrl",
    "ServiceSettings",
    "SettingsGroup",
    "load_settings",
    "load_settings_or_exit",
]

SERVICE_TABLES = ("up", "gateway", "encoder", "generator")
_OFF = ("0", "false")
_REDIS_SCHEMES = ("redis", "rediss", "unix")
# What Kubernetes tells every container of each Service: of one named chiasm-encoder, among others,
# CHIASM_ENCODER_SERVICE_HOST and CHIASM_ENCODER_PORT=tcp://10.0.0.7:8021.
_KUBERNETES_NAME = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_URL = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SettingsT = TypeVar("SettingsT", bound="ServiceSettings")


def _check_redis_url(url: str) -> str:
    if not url:
        return url
    scheme, sign, rest = url.partition("://")
    if scheme not in _REDIS_SCHEMES or not sign:
        raise ValueError(
            "must start with redis://, rediss:// or unix://; Cluster and Sentinel are not supported"
            " yet"
        )
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.path.strip("/") if scheme == "unix" else rest and parts.port != 0)
    except ValueError:
        is_complete = False
    if not is_complete:
        raise ValueError(
            "must be redis://[user:password@]host[:port][/database] or unix:///path, with special"
            " characters of the password percent-encoded"
        )
    return url


# URL of one Redis; empty where a service can do without.
RedisUrl = Annotated[str, AfterValidator(_check_redis_url)]


class SettingsGroup(BaseModel):
    """Base of the sub-models that group a service's settings."""

    model_config = {"frozen": True, "extra": "forbid"}


class ServiceSettings(BaseSettings):
    """Base of the settings of one service; instances never change.

    Attributes:
        flag_aliases: Other spellings of flags, without dashes in front, such as vLLM's.
        env_aliases: Other environment names and the field each one sets.
        env_off_switches: Other environment names whose value 0 sets a field to a text.
        refused_flags: Flags that are refused, with the sentence that says why.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    flag_aliases: ClassVar[Mapping[str, str]] = {}
    env_aliases: ClassVar[Mapping[str, str]] = {}
    env_off_switches: ClassVar[Mapping[str, tuple[str, str]]] = {}
    refused_flags: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor only; ``load_settings`` merges the other sources."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    def log_fields(self) -> dict[str, object]:
        """Return every setting by name for the one log line at start; secrets are masked."""
        return {setting.name: _shown(setting.value_in(self)) for setting in settings_of(type(self))}


def load_settings(
    model: type[SettingsT],
    service: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
) -> SettingsT:
    """Build the settings of a service from all sources.

    ``--help`` prints every setting and exits.

    Args:
        model: Settings class of the service.
        service: Service name; environment names start with ``CHIASM_<SERVICE>_``.
        argv: Flags, without the program's name.
        environ: Environment; the process's own if ``None``.

    Raises:
        ConfigError: A key is unknown or a value does not fit; names the key, the value and, of an
            unknown key, the nearest known one.
    """
    environ = os.environ if environ is None else environ
    settings = settings_of(model)
    flags = FlagParser(model, service, settings).parse(argv)
    from_env = _read_environment(model, service, settings, environ)
    file = flags.pop("config", None) or from_env.pop("config", None)
    from_env.pop("config", None)
    from_file = _read_file(Path(str(file)), service, settings) if file else {}
    return _build(model, settings, {**from_file, **from_env, **flags})


def load_settings_or_exit(model: type[SettingsT], service: str, argv: Sequence[str]) -> SettingsT:
    """Do as ``load_settings``; a wrong setting ends the process with status 2 and one sentence."""
    try:
        return load_settings(model, service, argv)
    except ConfigError as error:
        _exit(service, str(error))


def _exit(service: str, message: str) -> NoReturn:
    sys.stderr.write(f"chiasm {service}: {message}\n")
    raise SystemExit(2)


def _read_environment(
    model: type[ServiceSettings],
    service: str,
    settings: Sequence[Setting],
    environ: Mapping[str, str],
) -> dict[str, Any]:
    prefix = f"CHIASM_{service.upper()}_"
    by_env = {prefix + setting.name.upper(): setting for setting in settings}
    by_name = {setting.name: setting for setting in settings}
    values = {
        name: by_name[name].parse(environ[alias])
        for alias, name in model.env_aliases.items()
        if alias in environ
    }
    for switch, (name, text) in model.env_off_switches.items():
        if environ.get(switch, "").strip().lower() in _OFF:
            values[name] = by_name[name].parse(text)
    for key, text in environ.items():
        if not key.startswith(prefix) or _is_of_kubernetes(key, text, by_env):
            continue
        if key == f"{prefix}CONFIG":
            values["config"] = text
        elif key in by_env:
            values[by_env[key].name] = by_env[key].parse(text)
        else:
            raise ConfigError(
                f"unknown environment variable {key}", key=key, nearest=nearest(key, by_env)
            )
    return values


def _is_of_kubernetes(key: str, text: str, by_env: Mapping[str, Setting]) -> bool:
    """Return whether Kubernetes set a variable, not somebody who meant a setting."""
    if key.endswith("_PORT") and _KUBERNETES_URL.match(text):
        return True
    return key not in by_env and _KUBERNETES_NAME.fullmatch(key) is not None


def _read_file(path: Path, service: str, settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the values in the service's table of a TOML file that all services share."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the configuration file {path} cannot be read: {error}", key="config", value=str(path)
        ) from error
    for table, content in document.items():
        if table not in SERVICE_TABLES:
            raise ConfigError(
                f"unknown table [{table}] in {path}",
                key=table,
                nearest=nearest(table, SERVICE_TABLES),
            )
        if not isinstance(content, dict):
            raise ConfigError(f"{table} in {path} must be a table", key=table, value=content)
    values: dict[str, Any] = {}
    groups = {setting.group for setting in settings if setting.group}
    by_name = {setting.name: setting for setting in settings}
    pending = list(document.get(service, {}).items())
    while pending:
        key, value = pending.pop()
        if key in groups and isinstance(value, dict):
            pending.extend(value.items())
        elif key in by_name:
            values[key] = value
        else:
            raise ConfigError(
                f"unknown key {key!r} in [{service}] of {path}",
                key=key,
                value=value,
                nearest=nearest(key, by_name),
            )
    return values


def _build(
    model: type[SettingsT], settings: Sequence[Setting], values: Mapping[str, Any]
) -> SettingsT:
    # A group without a default is built even if empty, so that what it lacks is named.
    nested: dict[str, Any] = {
        setting.group: {}
        for setting in settings
        if setting.group and model.model_fields[setting.group].is_required()
    }
    for setting in settings:
        if setting.name in values:
            target = nested.setdefault(setting.group, {}) if setting.group else nested
            target[setting.name] = values[setting.name]
    try:
        return model(**nested)
    except ValidationError as error:
        raise _refusal(settings, values, error.errors()[0]) from None


def _refusal(
    settings: Sequence[Setting], values: Mapping[str, Any], details: ErrorDetails
) -> ConfigError:
    """Return the error for one finding of the model: a field's, or one about several fields."""
    message = details["msg"].removeprefix("Value error, ")
    setting = next((setting for setting in settings if setting.name in details["loc"]), None)
    if setting is None:
        return ConfigError(message, key=".".join(map(str, details["loc"])))
    if details["type"] == "missing":
        return ConfigError(f"{setting.flag} is required", key=setting.name)
    value = "**********" if setting.is_secret else values.get(setting.name)
    return ConfigError(f"{setting.flag}: {message}", key=setting.name, value=value)


def _shown(value: object) -> object:
    if isinstance(value, SecretStr | Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_shown(part) for part in value]
    return without_passwords(value)
