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


@pytest.mark.parametrize(
    "key",
    ["sécret", "ключ", "secret\u00a0", " secret", "secret\n", "secret\tkey", "secret\x7f"],
)
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(ApiKeysError, match="must be printable ASCII") as caught:
        ApiKeys.load(["good", key], None)
    assert key not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_key_that_no_header_can_carry_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("acme k1\nother schlüssel\n", encoding="utf-8")
    with pytest.raises(ApiKeysError, match=r"in line 2 of .* must be printable ASCII") as caught:
        ApiKeys.load([], path)
    assert "schlüssel" not in str(caught.value)


@pytest.mark.parametrize("key", ["k", "sk-A_b.c:d/e+f=", "two words", "!~"])
def test_a_key_of_printable_ascii_is_taken_and_known_again(key: str) -> None:
    assert ApiKeys.load([key], None).authenticate(f"Bearer {key}") == "default"
