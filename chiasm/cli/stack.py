"""Lay out a local stack: which processes, with which flags, on which addresses."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.error
import urllib.request
from functools import partial
from typing import TYPE_CHECKING

from chiasm.cli.child import ServiceSpec, child_environment
from chiasm.cli.probe import probe_grpc, probe_http
from chiasm.cli.thread_env import THREAD_ENV
from chiasm.common.config import load_settings
from chiasm.common.config_schema import settings_of
from chiasm.common.cores import count_cores
from chiasm.common.embedded_redis import EmbeddedRedis

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from chiasm.cli.flag_routing import RoutedFlags
    from chiasm.cli.stack_files import StackFiles
    from chiasm.cli.up_settings import UpSettings
    from chiasm.common.config import ServiceSettings

_LOOPBACK = "127.0.0.1"
# Where a server that listens on all addresses is reached.
_REACHED_AT = {"0.0.0.0": _LOOPBACK, "[::]": "[::1]"}
_PROBE_TIMEOUT_S = 2.0
_PROBE_PAUSE_S = 0.2
_KILL_MARGIN_S = 5.0


class StackLayout:
    """Builds the specs of all services of one local stack."""

    def __init__(
        self,
        settings: UpSettings,
        flags: RoutedFlags,
        models: Mapping[str, type[ServiceSettings]],
        files: StackFiles,
        config_file: str | None,
    ) -> None:
        """Build the layout.

        Args:
            settings: Settings of ``chiasm up``.
            flags: Flags that the user gave for the services; they win over the layout's own.
            models: Settings classes by service name.
            files: Files of the stack; token and secret exist.
            config_file: TOML file that the services read too.
        """
        self._settings = settings
        self._flags = flags
        self._models = models
        self._files = files
        self._config_file = config_file
        self._cores = settings.cores or count_cores()
        # The system may give a port twice, since nobody listens on it yet.
        self._taken_ports = {settings.port, settings.port + 1, settings.grpc_port}
        self._redis = (
            None
            if settings.redis_url
            else EmbeddedRedis(files.state_dir, settings.redis_max_memory_mib << 20)
        )

    def specs(self) -> list[ServiceSpec]:
        """Return every service, each after those that it depends on.

        Raises:
            ConfigError: A service would refuse its settings.
            EmbeddedRedisError: No Redis is installed, or the state directory is not private.
        """
        redis = [self._redis_spec(self._redis)] if self._redis else []
        names = tuple(spec.name for spec in redis)
        encoders = [
            self._model_spec("encoder", f"encoder-{n}", names)
            for n in range(self._settings.encoders)
        ]
        generator = self._model_spec("generator", "generator", names)
        peers = [*redis, *encoders, generator]
        return [*peers, self._gateway_spec(encoders, generator, peers)]

    def _redis_spec(self, redis: EmbeddedRedis) -> ServiceSpec:
        return ServiceSpec(
            name="redis",
            command=tuple(redis.command()),
            address=redis.url,
            wait_ready=partial(redis.wait_ready, timeout_s=self._settings.start_timeout_s),
        )

    def _model_spec(self, service: str, name: str, depends_on: tuple[str, ...]) -> ServiceSpec:
        address = f"{_LOOPBACK}:{self._free_port()}"
        metrics_port = self._free_port()
        own = {"listen": address, "metrics_port": str(metrics_port)}
        return ServiceSpec(
            name=name,
            command=self._command(service, own),
            address=address,
            wait_ready=partial(_poll, partial(probe_grpc, address, "", _PROBE_TIMEOUT_S)),
            depends_on=depends_on,
            env=self._env(service, self._cores),
            endpoints={
                "grpc": address,
                "metrics": f"http://{_LOOPBACK}:{metrics_port}/metrics",
            },
            drain_s=self._settings.drain_s + _KILL_MARGIN_S,
        )

    def _gateway_spec(
        self, encoders: list[ServiceSpec], generator: ServiceSpec, peers: list[ServiceSpec]
    ) -> ServiceSpec:
        host = _bracketed(self._settings.host)
        port = self._settings.port or self._free_port()
        address = f"{host}:{port}"
        own = {
            "listen": address,
            "grpc_listen": f"{host}:{self._grpc_port()}",
            "encoders": ",".join(spec.address for spec in encoders),
            "generators": generator.address,
        }
        probed = f"{_REACHED_AT.get(host, host)}:{port}"
        probe = partial(asyncio.to_thread, probe_http, probed, "/ready", _PROBE_TIMEOUT_S)
        return ServiceSpec(
            name="gateway",
            command=self._command("gateway", own),
            address=f"http://{address}",
            wait_ready=partial(_poll, probe),
            depends_on=tuple(spec.name for spec in peers),
            env=self._env("gateway", 1),
            endpoints={
                "http": f"http://{probed}",
                "grpc": own["grpc_listen"],
                "metrics": f"http://{probed}/metrics",
            },
            drain_s=self._settings.drain_s + _KILL_MARGIN_S,
        )

    def _command(self, service: str, own: Mapping[str, str]) -> tuple[str, ...]:
        """Return the command line of a service: what it knows of the stack, then the user's.

        Raises:
            ConfigError: The service would refuse it.
        """
        shared = {
            "model": self._settings.model,
            "service_token_file": str(self._files.service_token),
            "store_secret_file": str(self._files.store_secret),
            "core_page": str(self._files.core_page),
            "cores": str(self._cores),
            "drain_s": f"{self._settings.drain_s:g}",
            "log_level": "debug" if self._settings.log_level == "debug" else "info",
        }
        known = {setting.name: setting.flag for setting in settings_of(self._models[service])}
        values = {**{name: text for name, text in shared.items() if name in known}, **own}
        flags = [part for name, text in values.items() for part in (known[name], text)]
        config = ["--config", self._config_file] if self._config_file else []
        argv = [*config, *flags, *self._flags.services[service]]
        # What is wrong with the settings is told before anything is started.
        load_settings(
            self._models[service], service, argv, child_environment(self._redis_env(service))
        )
        return (sys.executable, "-m", f"chiasm.{service}", *argv)

    def _grpc_port(self) -> int:
        if self._settings.grpc_port is not None:
            return self._settings.grpc_port or self._free_port()
        return self._settings.port + 1 if self._settings.port else self._free_port()

    def _free_port(self) -> int:
        """Return a port that nobody listens on now and that no service of this stack has."""
        while (port := _find_free_port()) in self._taken_ports:
            pass
        self._taken_ports.add(port)
        return port

    def _env(self, service: str, threads: int) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(threads), **THREAD_ENV, **self._redis_env(service)}

    def _redis_env(self, service: str) -> dict[str, str]:
        """Return where Redis is; every user of the machine can read command lines."""
        url = self._settings.redis_url or (self._redis.url if self._redis else "")
        return {f"CHIASM_{service.upper()}_REDIS_URL": url}


def curl_example(url: str, model: str) -> str:
    """Return a command line that asks the stack something."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What can you see in a picture?"}],
        "max_tokens": 64,
    }
    return (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json'"
        f" -d '{json.dumps(body)}'"
    )


def served_model(url: str) -> str:
    """Return the name under which the gateway at ``url`` serves; ``MODEL`` if it does not tell."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=_PROBE_TIMEOUT_S) as response:
            return str(json.load(response)["data"][0]["id"])
    except urllib.error.HTTPError as refusal:
        # An HTTPError is the response itself and holds its socket open.
        refusal.close()
    except (OSError, ValueError, LookupError):
        pass
    return "MODEL"


def _bracketed(host: str) -> str:
    """Return ``host`` as it stands in front of a port: addresses of IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


async def _poll(probe: Callable[[], Awaitable[str | None]]) -> None:
    """Return when ``probe`` finds nothing wrong; whoever waits sets the deadline."""
    while True:
        if await probe() is None:
            return
        await asyncio.sleep(_PROBE_PAUSE_S)


def _find_free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        return int(listener.getsockname()[1])
