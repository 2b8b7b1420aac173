"""Settings of the gateway: limits in every spelling, what stops the start."""

from __future__ import annotations

import pytest

from chiasm.common.config import ConfigError, load_settings
from chiasm.common.limits import MAX_MEDIA_TTL_S
from chiasm.common.media import Modality
from chiasm.gateway.config import GatewaySettings

REQUIRED = ["--model", "m", "--service-token-file", "t", "--store-secret-file", "s"]


def load(*flags: str) -> GatewaySettings:
    return load_settings(GatewaySettings, "gateway", [*REQUIRED, *flags], {})


@pytest.mark.parametrize(
    "flags",
    [
        ["--limit-mm-per-prompt", '{"image": 5, "video": 1}'],
        ["--limit-mm-per-prompt", "image=5,video=1"],
        ["--limit-mm-per-prompt.image", "5", "--limit-mm-per-prompt.video=1"],
        ["--limit-mm-per-prompt", '{"image": {"count": 5, "width": 64}, "video": 1}'],
    ],
)
def test_item_limits_are_read_in_every_spelling(flags: list[str]) -> None:
    assert load(*flags).models.max_items == {Modality.IMAGE: 5, Modality.VIDEO: 1}


@pytest.mark.parametrize("value", ["smell=1", "image=-1", "image=many", "image"])
def test_a_wrong_item_limit_stops_the_start(value: str) -> None:
    with pytest.raises(ConfigError, match=r"limit.mm.per.prompt"):
        load("--limit-mm-per-prompt", value)


def test_keys_are_masked_in_logs() -> None:
    settings = load("--api-key", "secret-1,secret-2")
    assert "secret-" not in str(settings.log_fields())
    assert [key.get_secret_value() for key in settings.api_key] == ["secret-1", "secret-2"]


def test_an_empty_key_is_kept_so_that_it_can_be_refused() -> None:
    arguments = ["--model", "m", "--service-token-file", "t", "--store-secret-file", "s"]
    settings = load_settings(GatewaySettings, "gateway", arguments, {"VLLM_API_KEY": ""})
    assert [key.get_secret_value() for key in settings.api_key] == [""]


def test_media_are_not_kept_longer_than_what_is_known_of_their_bytes() -> None:
    longest = load("--max-media-ttl-s", str(MAX_MEDIA_TTL_S))
    assert longest.limits.max_media_ttl_s == MAX_MEDIA_TTL_S
    with pytest.raises(ConfigError, match=r"max.media.ttl.s"):
        load("--max-media-ttl-s", str(MAX_MEDIA_TTL_S + 1))
