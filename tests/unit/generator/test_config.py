"""Settings of the generator from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.common.config import ConfigError, load_settings
from chiasm.generator.config import GeneratorSettings

REQUIRED = ("--model", "/m/tiny", "--service-token-file", "/t", "--store-secret-file", "/s")


def _load(*flags: str) -> GeneratorSettings:
    return load_settings(GeneratorSettings, "generator", [*REQUIRED, *flags], environ={})


def test_model_name_defaults_to_the_directory() -> None:
    assert _load().model_name == "tiny"
    assert _load("--served-model-name", "other").model_name == "other"


def test_spellings_of_vllm_are_understood() -> None:
    settings = _load(
        *("--max-num-seqs", "4", "--max-num-batched-tokens", "128"),
        *("--num-gpu-blocks-override", "9", "--max-model-len", "99"),
    )

    assert settings.scheduling.max_running_sequences == 4
    assert settings.scheduling.max_step_tokens == 128
    assert settings.cache.num_blocks == 9
    assert settings.language_model.max_model_len == 99


def test_paths_and_switches_are_read() -> None:
    settings = _load("--step-trace", "/tmp/trace", "--dtype", "bfloat16")

    assert settings.step_trace == Path("/tmp/trace")
    assert settings.language_model.dtype == "bfloat16"
    assert settings.redis_url == ""


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-step-tokens", "8", "--max-running-sequences", "9"),
        ("--dtype", "int8"),
        ("--block-size", "0"),
        ("--trust-remote-code",),
        ("--no-such-flag", "1"),
    ],
    ids=" ".join,
)
def test_settings_that_cannot_work_stop_the_start(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        _load(*flags)
