"""``docker-compose.yml`` and the Dockerfiles, checked without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiasm.cli.up_settings import SERVICES, settings_model
from chiasm.common.config import ServiceSettings, load_settings
from chiasm.common.config_schema import settings_of
from tests.structure.tree import ROOT

COMPOSE = ROOT / "docker-compose.yml"
PROFILES = ("cpu", "gpu")
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+):-(?P<default>[^}]*)\}")
PINNED = re.compile(r"[a-z0-9./-]+:\d+\.\d+(\.\d+)?[a-z0-9.-]*")

Service = dict[str, Any]


def load_compose() -> dict[str, Any]:
    """Return the file with every variable at its default."""
    text = VARIABLE.sub(lambda match: match["default"], COMPOSE.read_text())
    assert "${" not in text, "every variable has a default"
    document = yaml.safe_load(text)
    assert isinstance(document, dict)
    return document


DOCUMENT = load_compose()
ALL: dict[str, Service] = DOCUMENT["services"]


def active_in(profile: str) -> dict[str, Service]:
    return {name: service for name, service in ALL.items() if profile in service["profiles"]}


def program_of(service: Service) -> str | None:
    """Return which of our services a container runs; ``None`` for others."""
    if "build" not in service or service.get("entrypoint"):
        return None
    dockerfile = Path(service["build"]["dockerfile"])
    return dockerfile.parts[1]


def is_one_shot(name: str) -> bool:
    return ALL[name].get("restart") == "no"


def settings_of_container(service: Service) -> ServiceSettings:
    program = program_of(service)
    assert program is not None
    environment = {key: str(value) for key, value in service.get("environment", {}).items()}
    argv = [str(part) for part in service.get("command", [])]
    return load_settings(settings_model(program), program, argv, environment)


OURS = [name for name, service in ALL.items() if program_of(service)]


def test_file_follows_the_compose_schema() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", COMPOSE],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_has_redis_and_all_three_services(profile: str) -> None:
    active = active_in(profile)

    assert "redis" in active
    assert sorted(filter(None, map(program_of, active.values()))) == sorted(SERVICES)


@pytest.mark.parametrize("name", ALL)
def test_image_is_pinned_and_never_the_latest(name: str) -> None:
    image = ALL[name]["image"]

    assert PINNED.fullmatch(image)
    assert "latest" not in image


@pytest.mark.parametrize("name", ALL)
def test_service_that_keeps_running_has_a_healthcheck(name: str) -> None:
    assert is_one_shot(name) or ALL[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("profile", PROFILES)
def test_dependencies_exist_and_can_become_what_is_waited_for(profile: str) -> None:
    active = active_in(profile)
    for service in active.values():
        for name, dependency in service.get("depends_on", {}).items():
            assert name in active or dependency.get("required") is False
            if dependency["condition"] == "service_healthy":
                assert "healthcheck" in ALL[name]
            else:
                assert dependency["condition"] == "service_completed_successfully"
                assert is_one_shot(name)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_service_of_the_profile_is_waited_for_by_the_gateway(profile: str) -> None:
    active = active_in(profile)

    assert set(ALL["gateway"]["depends_on"]) >= set(active) - {"gateway"}


def test_dependencies_form_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ALL):
        free = {name for name in ALL if set(ALL[name].get("depends_on", {})) <= done} - done
        assert free
        done |= free


@pytest.mark.parametrize("name", OURS)
def test_environment_names_exist_in_the_settings_of_the_service(name: str) -> None:
    program = program_of(ALL[name])
    assert program is not None
    known = {
        f"CHIASM_{program.upper()}_{setting.name.upper()}"
        for setting in settings_of(settings_model(program))
    }

    assert set(ALL[name].get("environment", {})) <= known


@pytest.mark.parametrize("name", OURS)
def test_command_and_environment_make_valid_settings(name: str) -> None:
    settings = settings_of_container(ALL[name])

    assert settings.log_fields()["listen"]


@pytest.mark.parametrize("name", OURS)
def test_service_listens_on_all_addresses_of_its_container(name: str) -> None:
    assert str(settings_of_container(ALL[name]).log_fields()["listen"]).startswith("0.0.0.0:")


@pytest.mark.parametrize("name", OURS)
def test_secrets_come_from_the_volume_that_init_fills(name: str) -> None:
    fields = settings_of_container(ALL[name]).log_fields()
    folder = ALL["init"]["command"][1]

    assert fields["service_token_file"] == f"{folder}/service_token"
    assert fields["store_secret_file"] == f"{folder}/store_secret"
    assert f"state:{folder}" in ALL[name]["volumes"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("peer", ["encoders", "generators"])
def test_names_that_the_gateway_resolves_exist_with_their_ports(profile: str, peer: str) -> None:
    fields = settings_of_container(ALL["gateway"]).log_fields()
    host, _, port = str(fields[peer]).partition(":")
    found = [
        service
        for name, service in active_in(profile).items()
        if host == name or host in aliases_of(service)
    ]

    assert len(found) == 1
    assert str(settings_of_container(found[0]).log_fields()["listen"]).endswith(f":{port}")


def aliases_of(service: Service) -> set[str]:
    networks = service.get("networks", {})
    if isinstance(networks, list):
        return set()
    return {alias for network in networks.values() for alias in network.get("aliases", ())}


@pytest.mark.parametrize("name", OURS)
def test_redis_is_reached_under_its_name_on_a_shared_network(name: str) -> None:
    fields = settings_of_container(ALL[name]).log_fields()

    assert str(fields["redis_url"]).startswith("redis://redis:6379")
    assert set(ALL["redis"]["networks"]) & set(ALL[name]["networks"])


@pytest.mark.parametrize("name", OURS)
def test_probe_asks_the_port_that_the_service_listens_on(name: str) -> None:
    port = str(settings_of_container(ALL[name]).log_fields()["listen"]).rpartition(":")[2]
    test = ALL[name]["healthcheck"]["test"]

    assert test[:3] == ["CMD", "chiasm", "probe"]
    assert f"127.0.0.1:{port}" in test[3]


def test_only_the_gateway_is_published_and_each_port_once() -> None:
    published = {name: service["ports"] for name, service in ALL.items() if "ports" in service}
    hosts = [port.rpartition(":")[0] for ports in published.values() for port in ports]
    inside = {port.rpartition(":")[2] for port in published["gateway"]}
    fields = settings_of_container(ALL["gateway"]).log_fields()

    assert set(published) == {"gateway"}
    assert len(hosts) == len(set(hosts))
    assert all(host.startswith("127.0.0.1:") for host in hosts)
    assert inside == {str(fields[key]).rpartition(":")[2] for key in ("listen", "grpc_listen")}


@pytest.mark.parametrize("name", ["encoder", "encoder-gpu"])
def test_encoder_can_be_scaled(name: str) -> None:
    assert "container_name" not in ALL[name]
    assert "ports" not in ALL[name]


def test_volumes_and_networks_are_declared() -> None:
    for service in ALL.values():
        named = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert {name for name in named if not name.startswith((".", "/"))} <= set(
            DOCUMENT["volumes"]
        )
        assert set(service.get("networks", ())) <= set(DOCUMENT["networks"])


def test_no_secret_stands_in_the_file() -> None:
    for service in ALL.values():
        for key in service.get("environment", {}):
            assert key.endswith("_FILE") or not re.search("TOKEN|SECRET|PASSWORD|KEY", key)


@pytest.mark.parametrize("name", [name for name in ALL if "build" in ALL[name]])
def test_build_names_a_dockerfile_that_takes_its_arguments(name: str) -> None:
    build = ALL[name]["build"]
    text = (ROOT / build["dockerfile"]).read_text()

    assert set(build["args"]) <= set(re.findall(r"^ARG ([A-Z_]+)", text, re.MULTILINE))


@pytest.mark.parametrize("service", SERVICES)
def test_dockerfile_is_pinned_unprivileged_and_healthchecked(service: str) -> None:
    text = (ROOT / "services" / service / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)

    assert len(bases) == 2
    assert all(PINNED.fullmatch(base) for base in bases)
    assert re.search(r"^USER chiasm$", text, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", text, re.MULTILINE)
    assert f'ENTRYPOINT ["python", "-m", "chiasm.{service}"]' in text


@pytest.mark.parametrize("service", SERVICES)
def test_files_that_a_dockerfile_copies_exist_and_are_not_ignored(service: str) -> None:
    text = (ROOT / "services" / service / "Dockerfile").read_text()
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    }

    assert copied <= allowed
    assert all((ROOT / source).exists() for source in copied)


def test_gateway_image_is_built_from_a_lock_without_torch() -> None:
    text = (ROOT / "services" / "gateway" / "Dockerfile").read_text()
    locked = (ROOT / "requirements" / "gateway.lock").read_text()

    assert "requirements/gateway.lock" in text
    assert not re.search(r"^(torch|torchvision|transformers|triton|nvidia)", locked, re.MULTILINE)
