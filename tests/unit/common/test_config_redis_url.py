"""The URL of Redis among the settings: which ones are taken, and that no password is shown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from pydantic import Field

from chiasm.common.config import ConfigError, RedisUrl, ServiceSettings, load_settings

if TYPE_CHECKING:
    from pathlib import Path


class EncoderSettings(ServiceSettings):
    """Settings of a service that exists only here."""

    redis_url: RedisUrl = Field("", description="Redis")


def load(*argv: str) -> EncoderSettings:
    return load_settings(EncoderSettings, "encoder", argv, {})


@pytest.mark.parametrize(
    "url", ["", "redis://h", "rediss://u:p@h:6380/1", "unix:///run/redis.sock?db=1"]
)
def test_url_of_one_redis_is_taken(url: str) -> None:
    assert load("--redis-url", url).redis_url == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis+cluster://h", "Cluster and Sentinel are not supported yet"),
        ("redis+sentinel://h/main", "Cluster and Sentinel are not supported yet"),
        ("rdis://h", "must start with redis://, rediss:// or unix://"),
        ("redis:h", "must start with redis://"),
        ("h:6379", "must start with redis://"),
        ("redis://", "must be redis://"),
        ("redis://h:port", "must be redis://"),
        ("unix://", "must be redis://"),
        ("unix:///", "must be redis://"),
        ("unix://?password=p", "unix:///path"),
        ("unix://user:p@", "unix:///path"),
    ],
)
def test_url_of_another_kind_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        load("--redis-url", url)

    assert caught.value.key == "redis_url"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hidden@h:6379/0",
        "rediss://user:hid@den@h",
        "redis://h?password=hidden&db=1",
        "unix://:hidden@/run/redis.sock",
    ],
)
def test_password_of_a_url_is_not_logged(url: str) -> None:
    shown = str(load("--redis-url", url).log_fields()["redis_url"])

    assert "***" in shown
    assert "hid" not in shown
    assert shown.startswith(url.partition("://")[0])


@pytest.mark.parametrize(
    "argv",
    [
        ("--redis-url", "rdis://:hidden@h"),
        ("--redis-url", "redis//:hidden@h"),
        ("--redis-ulr=redis://:hidden@h",),
        ("redis://:hidden@h",),
    ],
)
def test_password_of_a_url_is_in_no_refusal(argv: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)

    assert "hidden" not in str(caught.value)


def test_password_of_a_url_under_an_unknown_key_of_a_file_is_not_shown(
    tmp_path: Path,
) -> None:
    config_file = tmp_path / "chiasm.toml"
    config_file.write_text('[encoder]\nredis_ulr = "redis://:hidden@h"\n')

    with pytest.raises(ConfigError) as caught:
        load("--config", str(config_file))

    assert "hidden" not in str(caught.value)
