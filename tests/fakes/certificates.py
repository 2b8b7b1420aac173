"""Certificates for ``localhost``, made by the openssl program where there is one."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_OPTIONS = (
    "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
)


@dataclass(frozen=True)
class Certificate:
    """A certificate that is its own authority, and its key."""

    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path, name: str = "localhost") -> Certificate:
        """Make one for ``name`` in ``folder``, or skip the test if openssl is not installed."""
        program = shutil.which("openssl")
        if program is None:
            pytest.skip("openssl is not installed, so there is no certificate to test TLS with")
        made = cls(folder / f"{name}.pem", folder / f"{name}.key")
        files = ["-keyout", str(made.key), "-out", str(made.certificate)]
        names = ["-addext", f"subjectAltName=DNS:{name}"]
        subprocess.run(
            [program, "req", *_OPTIONS.split(), *names, *files], check=True, capture_output=True
        )
        return made

    def server_context(self) -> ssl.SSLContext:
        """Return the context of a server that shows it."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key)
        return context
