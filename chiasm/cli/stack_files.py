"""The files of one stack: secrets, core page, lock, logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.secrets import StoreSecrets
from chiasm.common.service_token import load_or_create_service_token

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class StackFiles:
    """Files of one stack, all below its state directory."""

    state_dir: Path

    @property
    def service_token(self) -> Path:
        """The secret that internal callers show."""
        return self.state_dir / "service_token"

    @property
    def store_secret(self) -> Path:
        """The secret that the store's keys derive from."""
        return self.state_dir / "store_secret"

    @property
    def core_page(self) -> Path:
        """The page through which services share cores."""
        return self.state_dir / "cores.page"

    @property
    def endpoints(self) -> Path:
        """JSON object with the URLs of each service, while the stack runs."""
        return self.state_dir / "endpoints.json"

    @property
    def lock(self) -> Path:
        """Held by the one stack that uses the directory."""
        return self.state_dir / "up.lock"

    @property
    def logs(self) -> Path:
        """Directory of the services' logs."""
        return self.state_dir / "logs"

    def make_secrets(self) -> Path:
        """Make the token and the secret unless they are there; return their directory.

        Raises:
            ServiceTokenError: The token cannot be made, or what is there is not one.
            StoreSecretsError: The same of the secret.
        """
        load_or_create_service_token(self.service_token)
        StoreSecrets.load_or_create(self.store_secret)
        return self.state_dir
