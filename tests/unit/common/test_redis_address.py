"""Tests of ``chiasm.common.redis_address``."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest

from chiasm.common.redis_address import RedisAddress, TlsOptions

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("unix:///run/r%20s.sock", RedisAddress(path="/run/r s.sock")),
        ("unix:///r.sock?db=2&password=p%40", RedisAddress("/r.sock", password="p@", database=2)),
        ("redis://", RedisAddress()),
        ("redis://h", RedisAddress(host="h")),
        ("redis://h:1/3", RedisAddress(host="h", port=1, database=3)),
        ("redis://[::1]:7", RedisAddress(host="::1", port=7)),
        ("redis://u:p%2F@h", RedisAddress(host="h", username="u", password="p/")),
        ("rediss://h:2", RedisAddress(host="h", port=2, tls=TlsOptions())),
        (
            "rediss://h?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem",
            RedisAddress(host="h", tls=TlsOptions("/ca.pem", "", "/c.pem", "/k.pem")),
        ),
        (
            "rediss://h?ssl_cert_reqs=none&ssl_check_hostname=false",
            RedisAddress(host="h", tls=TlsOptions(must_verify=False, must_match_host=False)),
        ),
    ],
)
def test_url_tells_where_and_as_whom(url: str, expected: RedisAddress) -> None:
    assert RedisAddress.parse(url) == expected


@pytest.mark.parametrize("url", ["http://h", "redis+cluster://h", "redis://h?db=x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        RedisAddress.parse(url)


def test_password_is_not_shown() -> None:
    assert "secret" not in repr(RedisAddress.parse("redis://u:secret@h"))


def test_server_is_verified_unless_the_url_says_otherwise() -> None:
    strict, lax = TlsOptions().context(), TlsOptions(must_verify=False).context()

    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (lax.verify_mode, lax.check_hostname) == (ssl.CERT_NONE, False)


def test_files_that_are_no_certificates_are_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ssl.SSLError, match="X509"):
        TlsOptions(ca_certs=str(tmp_path / "ca.pem")).context()
    with pytest.raises(FileNotFoundError):
        TlsOptions(certfile=str(tmp_path / "none.pem")).context()
