"""The encoder's settings: defaults, vLLM's names, and what is refused."""

from __future__ import annotations

import pytest

from chiasm.common.config import ConfigError, load_settings
from chiasm.encoder.config import EncoderSettings

REQUIRED = [
    *("--model", "models/demo", "--redis-url", "redis://localhost"),
    *("--service-token-file", "token", "--store-secret-file", "secret"),
]


def load(*flags: str, **environ: str) -> EncoderSettings:
    return load_settings(EncoderSettings, "encoder", [*REQUIRED, *flags], environ)


def test_the_name_of_the_model_is_that_of_its_directory_unless_given() -> None:
    assert load().model_name == "demo"
    assert load("--served-model-name", "eyes").model_name == "eyes"


def test_vllms_environment_names_are_honoured() -> None:
    settings = load(VLLM_IMAGE_FETCH_TIMEOUT="7", VLLM_MAX_IMAGE_PIXELS="1000")

    assert settings.fetch.image_fetch_timeout_s == 7.0
    assert settings.decode.max_image_pixels == 1000


def test_vllms_redirect_switch_overrides_the_default_and_no_flag() -> None:
    off = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}

    assert load(**off).fetch.media_redirects == 0
    assert load("--media-redirects", "2", **off).fetch.media_redirects == 2
    assert load(CHIASM_ENCODER_MEDIA_REDIRECTS="2", **off).fetch.media_redirects == 2
    assert load(VLLM_MEDIA_URL_ALLOW_REDIRECTS="1").fetch.media_redirects == 3


def test_lists_are_separated_by_commas() -> None:
    settings = load(
        *("--allow-private-media", "10.0.0.0/8,::1/128"),
        *("--allowed-media-domains", "Good.example,other.example"),
    )

    assert settings.fetch.allow_private_media == ("10.0.0.0/8", "::1/128")
    assert settings.fetch.allowed_media_domains == ("good.example", "other.example")


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--allow-private-media", "10.0.0.1/8"), "allow_private_media"),
        (("--allow-private-media", "everything"), "allow_private_media"),
        (("--media-redirects", "11"), "media_redirects"),
        (("--decode-workers", "0"), "decode_workers"),
        (("--dtype", "int8"), "dtype"),
        (("--redis-url", ""), "redis_url"),
    ],
)
def test_values_that_do_not_fit_name_the_setting(flags: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*flags)
    assert caught.value.key == key


def test_the_queue_must_hold_one_picture() -> None:
    with pytest.raises(ConfigError, match="max_queue_pixels must not be below max_image_pixels"):
        load("--max-queue-pixels", "1000")


def test_code_from_checkpoints_is_refused() -> None:
    with pytest.raises(ConfigError, match="never run"):
        load("--trust-remote-code")


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "num_threads"),
    [(1, 2, 1), (2, 2, 1), (4, 2, 1), (6, 3, 1), (8, 4, 2), (32, 16, 8), (96, 16, 8)],
)
def test_what_works_beside_the_tower_follows_the_cores(
    num_cores: int, num_workers: int, num_threads: int
) -> None:
    settings = load("--cores", str(num_cores))

    assert settings.num_decode_workers == num_workers
    assert settings.num_preprocess_threads == num_threads


def test_what_works_beside_the_tower_is_what_was_asked_for() -> None:
    settings = load("--cores", "8", "--decode-workers", "1", "--preprocess-threads", "5")

    assert (settings.num_decode_workers, settings.num_preprocess_threads) == (1, 5)
