"""Settings of ``chiasm up``, and where those of each service are found."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from chiasm.common.config import RedisUrl, ServiceSettings

SERVICES = ("gateway", "encoder", "generator")

_MAX_PORT = 65535


def default_state_dir() -> Path:
    """Return where a stack keeps its token, secret, socket and logs."""
    state_home = os.environ.get("XDG_STATE_HOME")
    return Path(state_home) / "chiasm" if state_home else Path.home() / ".cache" / "chiasm"


class UpSettings(ServiceSettings):
    """Start the whole stack for MODEL on this machine: chiasm up MODEL [flags]."""

    model: str = Field(description="Checkpoint directory; also the first argument")
    host: str = Field("127.0.0.1", description="Address the gateway listens on")
    port: int = Field(8000, ge=0, le=_MAX_PORT, description="HTTP port of the gateway")
    grpc_port: int | None = Field(
        None, ge=0, le=_MAX_PORT, description="gRPC port of the gateway; the HTTP port plus 1"
    )
    encoders: int = Field(1, ge=0, le=64, description="Number of encoder processes")
    redis_url: RedisUrl | None = Field(
        None, description="Redis to use; without one a private Redis is started"
    )
    redis_max_memory_mib: int = Field(
        1024, ge=16, description="Memory of the private Redis, in MiB"
    )
    state_dir: Path | None = Field(
        None,
        description=(
            "Directory of the token, the store secret, the socket and the logs;"
            " $XDG_STATE_HOME/chiasm, else ~/.cache/chiasm"
        ),
    )
    cores: int | None = Field(None, ge=1, description="Cores to share; all of them if not given")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="Least severe level of the services' lines that are shown"
    )
    start_timeout_s: float = Field(
        600.0, gt=0, description="Seconds within which each service must be ready"
    )
    drain_s: float = Field(
        30.0, ge=0, description="Seconds that running requests may take to finish on stop"
    )

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        if self.grpc_port is None and self.port == _MAX_PORT:
            raise ValueError(
                f"--port {self.port} has no port behind it for gRPC; give --grpc-port or another"
                " --port"
            )
        if self.grpc_port and self.grpc_port == self.port:
            raise ValueError(f"--port and --grpc-port are both {self.port}; they must differ")
        return self


def settings_model(service: str) -> type[ServiceSettings]:
    """Return the settings class of a service."""
    module = importlib.import_module(f"chiasm.{service}.config")
    model = getattr(module, f"{service.title()}Settings")
    assert isinstance(model, type), "a settings model is a class"
    assert issubclass(model, ServiceSettings), f"{model} must be a ServiceSettings"
    return model
