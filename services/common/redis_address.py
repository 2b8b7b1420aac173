"""Read from a Redis URL what a connection needs: where, as whom, which database, how encrypted."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any

from redis.connection import SSLConnection, parse_url

_DEFAULT_PORT = 6379


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """How a server proves itself, and the client to it.

    Attributes:
        ca_certs: File of the certificate authorities; empty takes the system's.
        ca_path: Directory of certificate authorities; empty takes none.
        certfile: Certificate that the client shows; empty for none.
        keyfile: Its private key.
        must_verify: Whether a server without a valid certificate is refused.
        must_match_host: Whether the certificate must name the host.
    """

    ca_certs: str = ""
    ca_path: str = ""
    certfile: str = ""
    keyfile: str = ""
    must_verify: bool = True
    must_match_host: bool = True

    def context(self) -> ssl.SSLContext:
        """Return a new context.

        Raises:
            OSError: A file cannot be read or is no certificate or key.
        """
        context = ssl.create_default_context()
        context.check_hostname = self.must_verify and self.must_match_host
        context.verify_mode = ssl.CERT_REQUIRED if self.must_verify else ssl.CERT_NONE
        if self.ca_certs or self.ca_path:
            context.load_verify_locations(self.ca_certs or None, self.ca_path or None)
        if self.certfile:
            context.load_cert_chain(self.certfile, self.keyfile or None)
        return context


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is and how to log in.

    Attributes:
        path: UNIX socket; empty if it is reached over TCP.
        host: Name or address, over TCP.
        port: Port, over TCP.
        username: ACL user; empty for the default user.
        password: Empty for none.
        database: Database to select.
        tls: Encryption; ``None`` for none.
    """

    path: str = ""
    host: str = "localhost"
    port: int = _DEFAULT_PORT
    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    tls: TlsOptions | None = None

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Return what ``url`` says, in redis-py's spelling of options.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``.

        Raises:
            ValueError: It is none of these, or an option has a wrong value.
        """
        options = parse_url(url)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        is_encrypted = options.get("connection_class") is SSLConnection
        return cls(
            path=options.get("path", ""),
            host=options.get("host", "localhost"),
            port=options.get("port", _DEFAULT_PORT),
            username=options.get("username", ""),
            password=options.get("password", ""),
            database=options.get("db", 0),
            tls=_tls_options(options) if is_encrypted else None,
        )


def _tls_options(options: dict[str, Any]) -> TlsOptions:
    return TlsOptions(
        ca_certs=options.get("ssl_ca_certs", ""),
        ca_path=options.get("ssl_ca_path", ""),
        certfile=options.get("ssl_certfile", ""),
        keyfile=options.get("ssl_keyfile", ""),
        must_verify=options.get("ssl_cert_reqs", "required") == "required",
        must_match_host=options.get("ssl_check_hostname", True),
    )
