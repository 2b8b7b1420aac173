"""Settings: precedence of the sources, and what happens to keys and values that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, SecretStr, ValidationError, model_validator

from chiasm.common.config import (
    ConfigError,
    ServiceSettings,
    SettingsGroup,
    load_settings,
    load_settings_or_exit,
)
from chiasm.common.config_schema import settings_of


class QueueSettings(SettingsGroup):
    """Bounds of the queue."""

    max_queue_items: int = Field(8, ge=1, description="Items that may wait")


class EncoderSettings(ServiceSettings):
    """Settings of a service that exists only here."""

    flag_aliases: ClassVar = {"served": "served_model_name"}
    env_aliases: ClassVar = {"VLLM_IMAGE_FETCH_TIMEOUT": "fetch_timeout_s"}
    refused_flags: ClassVar = {"trust-remote-code": "code from a checkpoint is never run"}

    listen: str = Field("127.0.0.1:0", description="Address to listen on")
    model: Path | None = Field(None, description="Checkpoint directory")
    served_model_name: str = Field("m", description="Name, 100% free")
    fetch_timeout_s: float = Field(5.0, gt=0, description="Seconds of a fetch")
    domains: tuple[str, ...] = Field((), description="Hosts")
    limit_mm_per_prompt: dict[str, int] = Field({}, description="Items by modality")
    is_strict: bool = Field(False, description="Refuse unknown fields")
    api_key: SecretStr | None = Field(None, description="Key of clients")
    queue: QueueSettings = QueueSettings()


def load(
    *argv: str, env: dict[str, str] | None = None, file: Path | None = None
) -> EncoderSettings:
    flags = [*argv, *(("--config", str(file)) if file else ())]
    return load_settings(EncoderSettings, "encoder", flags, env or {})


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "chiasm.toml"
    path.write_text('[encoder]\nlisten = "file:1"\n[gateway]\nanything = 1\n')
    return path


def test_default_holds_when_no_source_names_the_setting() -> None:
    assert load().listen == "127.0.0.1:0"


def test_file_wins_over_default(config_file: Path) -> None:
    assert load(file=config_file).listen == "file:1"


def test_environment_wins_over_file(config_file: Path) -> None:
    env = {"CHIASM_ENCODER_LISTEN": "env:1"}

    assert load(env=env, file=config_file).listen == "env:1"


def test_flag_wins_over_environment_and_file(config_file: Path) -> None:
    env = {"CHIASM_ENCODER_LISTEN": "env:1"}

    assert load("--listen", "flag:1", env=env, file=config_file).listen == "flag:1"


def test_configuration_file_may_be_named_by_the_environment(config_file: Path) -> None:
    assert load(env={"CHIASM_ENCODER_CONFIG": str(config_file)}).listen == "file:1"


def test_variables_without_the_prefix_are_not_read() -> None:
    assert load(env={"LISTEN": "x:1", "MODEL": "x", "CHIASM_GATEWAY_LISTEN": "x:1"}) == load()


def test_variables_of_the_process_never_reach_a_model_built_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LISTEN", "x:1")

    assert EncoderSettings().listen == "127.0.0.1:0"


def test_settings_of_a_group_have_flags_and_variables_of_their_own() -> None:
    assert load("--max-queue-items", "3").queue.max_queue_items == 3
    assert load(env={"CHIASM_ENCODER_MAX_QUEUE_ITEMS": "4"}).queue.max_queue_items == 4


@pytest.mark.parametrize("table", ["[encoder]", "[encoder.queue]"])
def test_settings_of_a_group_may_stand_in_its_table_or_in_the_services(
    tmp_path: Path, table: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"{table}\nmax_queue_items = 5\n")

    assert load(file=path).queue.max_queue_items == 5


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), False),
        (("--is-strict",), True),
        (("--is-strict", "false"), False),
        (("--is-strict=true",), True),
        (("--is-strict", "--no-is-strict"), False),
    ],
)
def test_switch_is_set_by_its_flag_and_cleared_by_its_negation(
    argv: tuple[str, ...], expected: bool
) -> None:
    assert load(*argv).is_strict is expected


@pytest.mark.parametrize(
    "argv",
    [
        ("--domains", "a,b"),
        ("--domains", "a", "--domains", "b"),
        ("--domains=a, b",),
        ("--domains", '["a", "b"]'),
    ],
)
def test_sequence_is_given_by_commas_repetition_or_json(argv: tuple[str, ...]) -> None:
    assert load(*argv).domains == ("a", "b")


@pytest.mark.parametrize(
    "argv",
    [
        ("--limit-mm-per-prompt", '{"image": 5, "video": 1}'),
        ("--limit-mm-per-prompt", "image=5,video=1"),
        ("--limit-mm-per-prompt.image", "5", "--limit-mm-per-prompt.video=1"),
        ("--limit-mm-per-prompt", "image=5", "--limit-mm-per-prompt.video", "1"),
    ],
)
def test_mapping_is_given_by_json_pairs_or_dotted_flags(argv: tuple[str, ...]) -> None:
    assert load(*argv).limit_mm_per_prompt == {"image": 5, "video": 1}


def test_other_spellings_set_the_same_setting() -> None:
    assert load("--served", "name").served_model_name == "name"
    assert load(env={"VLLM_IMAGE_FETCH_TIMEOUT": "7"}).fetch_timeout_s == 7.0


def test_empty_text_clears_an_optional_setting() -> None:
    assert load("--model", "/a", "--model", "").model is None


@pytest.mark.parametrize(
    ("argv", "env", "toml", "nearest"),
    [
        (("--lisen", "x"), {}, "", "--listen"),
        (("--lisen=x",), {}, "", "--listen"),
        ((), {"CHIASM_ENCODER_LISTN": "x"}, "", "CHIASM_ENCODER_LISTEN"),
        ((), {}, "[encoder]\nlisten_to = 1", "listen"),
        ((), {}, "[encoder.queue]\nmax_queue_item = 1", "max_queue_items"),
        ((), {}, "[encodr]\nlisten = 1", "encoder"),
    ],
)
def test_unknown_key_stops_with_the_nearest_known_name(
    tmp_path: Path, argv: tuple[str, ...], env: dict[str, str], toml: str, nearest: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(toml)

    with pytest.raises(ConfigError, match=f"did you mean {nearest}") as caught:
        load(*argv, env=env, file=path)

    assert caught.value.nearest == nearest


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (("--fetch-timeout-s", "soon"), "fetch_timeout_s"),
        (("--fetch-timeout-s", "0"), "fetch_timeout_s"),
        (("--max-queue-items", "0"), "max_queue_items"),
        (("--limit-mm-per-prompt.image", "many"), "limit_mm_per_prompt"),
        (("--limit-mm-per-prompt", "image"), "limit_mm_per_prompt"),
        (("--limit-mm-per-prompt", "{"), "limit_mm_per_prompt"),
    ],
)
def test_value_that_does_not_fit_stops_with_the_key_and_the_value(
    argv: tuple[str, ...], key: str
) -> None:
    with pytest.raises(ConfigError, match="got") as caught:
        load(*argv)

    assert caught.value.key == key


def test_wrong_secret_is_not_shown() -> None:
    class Keys(ServiceSettings):
        """Keys."""

        api_key: SecretStr = Field(min_length=20, description="Key")

    with pytest.raises(ConfigError) as caught:
        load_settings(Keys, "encoder", ["--api-key", "short-secret"], {})

    assert "short-secret" not in str(caught.value)


@pytest.mark.parametrize("argv", [("--listen",), ("stray",), ("--limit-mm-per-prompt.image",)])
def test_flag_without_value_and_stray_argument_are_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        load(*argv)


def test_refused_flag_stops_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="refused: code from a checkpoint is never run"):
        load("--trust-remote-code")


@pytest.mark.parametrize("content", ["not toml", None])
def test_configuration_file_that_cannot_be_read_is_named(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_text(content)

    with pytest.raises(ConfigError, match=r"c\.toml cannot be read"):
        load(file=path)


@pytest.mark.parametrize("toml", ["encoder = 5", "up = 5", "[[encoder]]\nlisten = 'x'"])
def test_configuration_file_with_a_value_in_place_of_a_table_is_refused(
    tmp_path: Path, toml: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(toml)

    with pytest.raises(ConfigError, match=r"c\.toml must be a table \(got "):
        load(file=path)


def test_missing_required_setting_is_named_by_its_flag() -> None:
    class ModelGroup(SettingsGroup):
        """Group."""

        model: str = Field(description="Checkpoint")

    class Needy(ServiceSettings):
        """Needy."""

        tower: ModelGroup

    with pytest.raises(ConfigError, match="--model is required"):
        load_settings(Needy, "encoder", [], {})


def test_validator_may_refuse_a_combination_of_settings() -> None:
    class Pair(ServiceSettings):
        """Pair."""

        low: int = Field(1, description="Low")
        high: int = Field(2, description="High")

        @model_validator(mode="after")
        def _check(self) -> Pair:
            if self.low > self.high:
                raise ConfigError("low must not be over high", key="low", value=self.low)
            return self

    with pytest.raises(ConfigError, match=r"^low must not be over high \(got 3\)$"):
        load_settings(Pair, "encoder", ["--low", "3"], {})


def test_validator_may_also_raise_a_value_error() -> None:
    class Pair(ServiceSettings):
        """Pair."""

        low: int = Field(1, description="Low")

        @model_validator(mode="after")
        def _check(self) -> Pair:
            if self.low > 2:
                raise ValueError("low must not be over 2")
            return self

    with pytest.raises(ConfigError, match=r"^low must not be over 2$"):
        load_settings(Pair, "encoder", ["--low", "3"], {})


def test_settings_never_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().listen = "elsewhere:1"  # type: ignore[misc]  # that it is refused is the point


def test_help_lists_every_setting_with_its_sentence_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")

    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for setting in settings_of(EncoderSettings):
        assert setting.flag in text
        assert str(setting.info.description) in text
        assert f"CHIASM_ENCODER_{setting.name.upper()}" in text
    assert "default: 8" in text
    assert "--served" in text


def test_wrong_setting_ends_a_service_with_status_2_and_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings_or_exit(EncoderSettings, "encoder", ["--lisen", "x"])

    assert caught.value.code == 2
    error = "chiasm encoder: unknown flag --lisen; did you mean --listen?\n"
    assert capsys.readouterr().err == error


def test_log_fields_hold_every_setting_and_no_secret() -> None:
    fields = load("--api-key", "top-secret", "--domains", "a").log_fields()

    assert set(fields) == {setting.name for setting in settings_of(EncoderSettings)}
    assert fields["domains"] == ["a"]
    assert "top-secret" not in str(fields)
