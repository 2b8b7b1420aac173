"""The layout of a local stack: command lines, addresses, order."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.cli import stack
from chiasm.cli.flag_routing import FlagRouter
from chiasm.cli.stack import StackLayout, curl_example, served_model
from chiasm.cli.stack_files import StackFiles
from chiasm.cli.up_settings import SERVICES, UpSettings, default_state_dir, settings_model
from chiasm.common.config import load_settings

MODELS = {name: settings_model(name) for name in SERVICES}


def layout(state_dir: Path, *argv: str) -> StackLayout:
    flags = FlagRouter(UpSettings, MODELS).route(["models/demo", *argv])
    settings = load_settings(UpSettings, "up", flags.own, {})
    return StackLayout(settings, flags, MODELS, StackFiles(state_dir), None)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    # A socket path has at most 107 bytes.
    return Path("/tmp") / tmp_path.name


def test_stack_has_redis_encoders_generator_and_gateway_in_order_of_dependency(
    state_dir: Path,
) -> None:
    specs = layout(state_dir, "--encoders", "2").specs()

    names = [spec.name for spec in specs]
    assert names == ["redis", "encoder-0", "encoder-1", "generator", "gateway"]
    for index, spec in enumerate(specs):
        assert set(spec.depends_on) <= set(names[:index])
    assert set(specs[-1].depends_on) == set(names[:-1])


def test_given_redis_is_used_and_none_is_started(state_dir: Path) -> None:
    specs = layout(state_dir, "--redis-url", "redis://elsewhere:6379/0").specs()

    assert "redis" not in [spec.name for spec in specs]
    for spec in specs:
        service = spec.name.partition("-")[0].upper()
        assert spec.env[f"CHIASM_{service}_REDIS_URL"] == "redis://elsewhere:6379/0"


def test_password_of_redis_is_in_no_command_line(state_dir: Path) -> None:
    specs = layout(state_dir, "--redis-url", "redis://:secret@elsewhere:6379/0").specs()

    assert not [part for spec in specs for part in spec.command if "secret@" in part]


def test_every_command_line_is_understood_by_its_service(state_dir: Path) -> None:
    for spec in layout(state_dir, "--encoders", "2").specs()[1:]:
        service = spec.name.partition("-")[0]
        module = spec.command.index(f"chiasm.{service}")

        settings = load_settings(MODELS[service], service, spec.command[module + 1 :], spec.env)

        fields = settings.log_fields()
        assert fields["model"] == "models/demo"
        assert fields["service_token_file"] == str(state_dir / "service_token")
        assert fields["store_secret_file"] == str(state_dir / "store_secret")
        assert fields["redis_url"] == f"unix://{state_dir}/redis.sock"


def test_gateway_knows_where_the_other_services_listen(state_dir: Path) -> None:
    specs = {spec.name: spec for spec in layout(state_dir, "--encoders", "2").specs()}
    command = specs["gateway"].command

    encoders = command[command.index("--encoders") + 1].split(",")
    assert encoders == [specs["encoder-0"].address, specs["encoder-1"].address]
    assert command[command.index("--generators") + 1] == specs["generator"].address


def test_no_two_services_share_a_port(state_dir: Path) -> None:
    specs = layout(state_dir, "--encoders", "3").specs()
    urls = [url for spec in specs for kind, url in spec.endpoints.items() if kind != "http"]

    assert len(urls) == len(set(urls)) == 2 * 3 + 2 + 2


def test_port_that_the_system_gives_twice_is_taken_once(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([8000, 8001, 5000, 5000, 5000, 5001, 5001, 5002, 5003])
    monkeypatch.setattr(stack, "_find_free_port", lambda: next(given))

    specs = layout(state_dir).specs()

    urls = [url for spec in specs for kind, url in spec.endpoints.items() if kind != "redis"]
    ports = [int(url.removesuffix("/metrics").rpartition(":")[2]) for url in urls]
    assert sorted(set(ports)) == [5000, 5001, 5002, 5003, 8000, 8001]


def test_flags_of_users_win_over_those_of_the_layout(state_dir: Path) -> None:
    specs = layout(state_dir, "--gateway.drain-s", "7").specs()
    command = specs[-1].command

    settings = load_settings(
        MODELS["gateway"], "gateway", command[command.index("chiasm.gateway") + 1 :], specs[-1].env
    )

    assert settings.log_fields()["drain_s"] == 7


@pytest.mark.parametrize(
    ("flags", "grpc"),
    [
        ((), "127.0.0.1:8001"),
        (("--port", "9000"), ":9001"),
        (("--grpc-port", "7"), ":7"),
        (("--port", "65535", "--grpc-port", "65534"), ":65534"),
    ],
)
def test_grpc_port_follows_the_http_port_unless_given(
    state_dir: Path, flags: tuple[str, ...], grpc: str
) -> None:
    assert layout(state_dir, *flags).specs()[-1].endpoints["grpc"].endswith(grpc)


@pytest.mark.parametrize(
    ("host", "listened", "reached"),
    [
        ("::1", "[::1]", "[::1]"),
        ("[::1]", "[::1]", "[::1]"),
        ("::", "[::]", "[::1]"),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
        ("gateway.internal", "gateway.internal", "gateway.internal"),
    ],
)
def test_host_of_ipv6_stands_in_brackets_wherever_a_port_follows(
    state_dir: Path, host: str, listened: str, reached: str
) -> None:
    gateway = layout(state_dir, "--host", host).specs()[-1]

    assert gateway.command[gateway.command.index("--listen") + 1] == f"{listened}:8000"
    assert gateway.command[gateway.command.index("--grpc-listen") + 1] == f"{listened}:8001"
    assert gateway.address == f"http://{listened}:8000"
    assert gateway.endpoints == {
        "http": f"http://{reached}:8000",
        "grpc": f"{listened}:8001",
        "metrics": f"http://{reached}:8000/metrics",
    }


def test_model_services_spin_a_bounded_time_and_the_gateway_takes_one_thread(
    state_dir: Path,
) -> None:
    specs = {spec.name: spec for spec in layout(state_dir, "--cores", "6").specs()}

    assert specs["generator"].env["OMP_NUM_THREADS"] == "6"
    assert specs["gateway"].env["OMP_NUM_THREADS"] == "1"
    assert int(specs["encoder-0"].env["GOMP_SPINCOUNT"]) > 0


def test_state_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/state")
    assert default_state_dir() == Path("/srv/state/chiasm")

    monkeypatch.delenv("XDG_STATE_HOME")
    assert default_state_dir() == Path.home() / ".cache" / "chiasm"


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    files = StackFiles(tmp_path / "state")
    files.make_secrets()
    before = files.service_token.read_text(), files.store_secret.read_text()

    files.make_secrets()

    assert (files.service_token.read_text(), files.store_secret.read_text()) == before
    for path in (files.service_token, files.store_secret):
        assert path.stat().st_mode & 0o777 == 0o600


def test_example_is_one_line_that_names_the_model() -> None:
    example = curl_example("http://127.0.0.1:1", "demo")

    assert example.startswith("curl http://127.0.0.1:1/v1/chat/completions ")
    assert '"model": "demo"' in example
    assert "\n" not in example


def test_model_name_is_left_open_if_the_gateway_does_not_tell() -> None:
    assert served_model("http://127.0.0.1:1") == "MODEL"
