"""Settings beside the variables that Kubernetes gives to every container."""

from __future__ import annotations

import pytest
from pydantic import Field

from chiasm.common.config import ConfigError, ServiceSettings, load_settings


class EncoderSettings(ServiceSettings):
    """Settings of a service that exists only here."""

    listen: str = Field("127.0.0.1:0", description="Address to listen on")
    metrics_port: int = Field(0, description="Port of metrics")
    peer_service_port: int = Field(0, description="Port of another service")


def load(env: dict[str, str]) -> EncoderSettings:
    return load_settings(EncoderSettings, "encoder", [], env)


@pytest.mark.parametrize("service", ["CHIASM_ENCODER", "CHIASM_ENCODER_METRICS"])
def test_variables_that_kubernetes_makes_of_a_service_are_not_read(service: str) -> None:
    env = {
        f"{service}_SERVICE_HOST": "10.0.0.7",
        f"{service}_SERVICE_PORT": "8021",
        f"{service}_SERVICE_PORT_GRPC": "8021",
        f"{service}_PORT": "tcp://10.0.0.7:8021",
    }
    for protocol in ("tcp", "udp"):
        port = f"{service}_PORT_8021_{protocol.upper()}"
        env[port] = f"{protocol}://10.0.0.7:8021"
        env |= {f"{port}_PROTO": protocol, f"{port}_PORT": "8021", f"{port}_ADDR": "10.0.0.7"}

    assert load(env) == EncoderSettings()


def test_settings_whose_names_kubernetes_may_use_are_read() -> None:
    env = {"CHIASM_ENCODER_METRICS_PORT": "9000", "CHIASM_ENCODER_PEER_SERVICE_PORT": "9001"}

    assert load(env) == EncoderSettings(metrics_port=9000, peer_service_port=9001)


def test_wrong_value_of_a_setting_whose_name_kubernetes_may_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="--metrics-port"):
        load({"CHIASM_ENCODER_METRICS_PORT": "http://10.0.0.7:8021"})


@pytest.mark.parametrize("name", ["METRIC_PORT", "PORT", "LISTEN_PORT", "SERVICE_HOSTS"])
def test_misspelt_variable_that_is_like_one_of_kubernetes_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown environment variable CHIASM_ENCODER_{name}"):
        load({f"CHIASM_ENCODER_{name}": "8021"})
