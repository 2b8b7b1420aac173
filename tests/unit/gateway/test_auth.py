"""API keys: who is let in, and as whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import UnauthenticatedError
from chiasm.gateway.auth import ApiKeys, ApiKeysError

if TYPE_CHECKING:
    from pathlib import Path


def test_without_keys_everyone_is_the_default_tenant() -> None:
    assert ApiKeys({}).authenticate(None) == "default"
    assert ApiKeys({}).authenticate("Bearer anything") == "default"


@pytest.mark.parametrize("shown", [None, "", "Bearer", "Bearer ", "Bearer ke", "Basic key", "key"])
def test_with_keys_a_wrong_one_is_refused(shown: str | None) -> None:
    with pytest.raises(UnauthenticatedError):
        ApiKeys({"key": "a"}).authenticate(shown)


def test_a_file_gives_each_key_its_tenant(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\n\nacme k1\nother k2\n", encoding="utf-8")
    keys = ApiKeys.load(["k0"], path)
    tenants = [keys.authenticate(f"Bearer {key}") for key in ("k0", "k1", "k2")]
    assert tenants == ["default", "acme", "other"]


@pytest.mark.parametrize("line", ["lonely", "bad/tenant key", "a b c"])
def test_a_malformed_line_is_named_without_its_key(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"acme k1\n{line}\n", encoding="utf-8")
    with pytest.raises(ApiKeysError, match="Line 2") as caught:
        ApiKeys.load([], path)
    assert "key" not in str(caught.value).replace(str(path), "").replace("KEY", "")


@pytest.mark.parametrize("text", ["", "# none yet\n\n"])
def test_a_file_without_keys_does_not_open_the_door(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ApiKeysError, match="hold no key"):
        ApiKeys.load(["k0"], path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ApiKeysError, match="not UTF-8"):
        ApiKeys.load([], path)


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_does_not_open_the_door(key: str) -> None:
    with pytest.raises(ApiKeysError, match="is empty"):
        ApiKeys.load([key], None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ApiKeysError, match="cannot be read"):
        ApiKeys.load([], tmp_path / "none")
