"""Tests of ``chiasm.common.secrets``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chiasm.common.private_file import create_private
from chiasm.common.secrets import StoreSecrets, StoreSecretsError, tenant_tag

if TYPE_CHECKING:
    from pathlib import Path

_OLD = bytes(range(32))
_NEW = bytes(range(1, 33))


def test_the_file_is_made_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "store_secret"

    made = StoreSecrets.load_or_create(path)

    assert StoreSecrets.load_or_create(path).keys("a") == made.keys("a")
    assert StoreSecrets.load(path).keys("a") == made.keys("a")


def test_every_key_of_every_tenant_differs() -> None:
    secrets = StoreSecrets((_NEW, _OLD))
    keys = [keys for tenant in ("a", "b") for keys in secrets.generations(tenant)]
    derived = [key for k in keys for key in (k.id_key, k.alias_key, k.mac_key)]
    assert len(set(derived)) == len(derived) == 12


def test_a_tag_depends_on_the_tenant_only() -> None:
    tags = {secrets.keys("a").tag for secrets in (StoreSecrets((_OLD,)), StoreSecrets((_NEW,)))}
    assert tags == {tenant_tag("a")}
    assert tenant_tag("a") != tenant_tag("b")


def test_rotation_puts_the_new_key_first_and_still_finds_the_old_one() -> None:
    before = StoreSecrets((_OLD,)).keys("a")
    rotated = StoreSecrets((_NEW, _OLD))

    assert rotated.keys("a") != before
    assert rotated.generations("a") == (rotated.keys("a"), before)
    assert rotated.find("a", before.key_id) == before
    assert StoreSecrets((_NEW,)).find("a", before.key_id) is None


def test_keys_are_not_shown_in_their_text() -> None:
    keys = StoreSecrets((_OLD,)).keys("a")
    for key in (keys.id_key, keys.alias_key, keys.mac_key):
        assert repr(key) not in repr(keys)


def test_the_file_may_hold_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "store_secret"
    create_private(path, f"# rotated\n\n{_NEW.hex()}\n  {_OLD.hex()}\n".encode())
    assert StoreSecrets.load(path).generations("a") == StoreSecrets((_NEW, _OLD)).generations("a")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "1 to 8 store secrets"),
        (b"00ff\n", "32 bytes"),
        (b"z" * 64, "hex digits"),
        (b"\xff" * 64, "hex digits"),
        ((_OLD.hex() + "\n").encode() * 2, "twice"),
        (b"".join(b"%064x\n" % index for index in range(9)), "1 to 8 store secrets"),
        (b"#" * 20000, "larger than"),
    ],
    ids=["empty", "short", "letters", "binary", "twice", "9", "big"],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "store_secret"
    create_private(path, content)
    with pytest.raises(StoreSecretsError, match=text):
        StoreSecrets.load(path)


def test_a_missing_or_open_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store_secret"
    with pytest.raises(StoreSecretsError, match="cannot be read"):
        StoreSecrets.load(path)
    StoreSecrets.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(StoreSecretsError, match="chmod it to 0600"):
        StoreSecrets.load_or_create(path)
