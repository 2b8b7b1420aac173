"""Know what the encoders and generators are, without asking in the way of a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from chiasm.common.errors import ChiasmError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.common.media_resolver import MediaResolver

    from .encoder_client import EncoderClient, EncoderInfo
    from .generator_client import GeneratorClient, GeneratorInfo

_REFRESH_INTERVAL_S = 5.0
_FIRST_INTERVAL_S = 0.05
_CALL_TIMEOUT_S = 2.0

log = structlog.get_logger(__name__)


class StackInfo:
    """The last descriptions that encoders and generators gave, refreshed in the background.

    What was learnt stays known while a service is away, so that cached media are still served
    without an encoder. A new encoder fingerprint makes a new resolver.
    """

    def __init__(
        self,
        encoder: EncoderClient,
        generator: GeneratorClient,
        make_resolver: Callable[[bytes], MediaResolver] | None,
    ) -> None:
        """Take the peers.

        Args:
            encoder: Client of the encoders.
            generator: Client of the generators.
            make_resolver: Makes the resolver for a fingerprint; ``None`` without a store.
        """
        self._encoder_client = encoder
        self._generator_client = generator
        self._make_resolver = make_resolver
        self._refresher: asyncio.Task[None] | None = None
        self.encoder: EncoderInfo | None = None
        self.generator: GeneratorInfo | None = None
        self.resolver: MediaResolver | None = None

    async def start(self) -> None:
        """Begin to ask; returns before anything is known."""
        self._refresher = asyncio.create_task(self._refresh_often(), name="stack info")

    async def close(self) -> None:
        """Stop asking."""
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)

    async def refresh(self) -> None:
        """Ask both services once; one that does not answer keeps what is known of it."""
        await asyncio.gather(self._refresh_encoder(), self._refresh_generator())

    def missing(self) -> list[str]:
        """Return what lacks before the first answer can be given; empty if nothing does."""
        missing = []
        if self.generator is None or not self._generator_client.is_serving:
            missing.append("generator")
        if self.encoder is None or not self._encoder_client.is_serving:
            missing.append("encoder")
        return missing

    def require_generator(self) -> GeneratorInfo:
        """Return what the generator is; raise ``UnavailableError`` before it has told."""
        if self.generator is None:
            raise UnavailableError("The generator is starting.", retry_after_s=1.0)
        return self.generator

    def require_encoder(self) -> EncoderInfo:
        """Return what the encoder is; raise ``UnavailableError`` before it has told."""
        if self.encoder is None:
            raise UnavailableError("The encoder is starting.", retry_after_s=1.0)
        return self.encoder

    async def _refresh_often(self) -> None:
        while True:
            await self.refresh()
            is_known = self.encoder is not None and self.generator is not None
            await asyncio.sleep(_REFRESH_INTERVAL_S if is_known else _FIRST_INTERVAL_S)

    async def _refresh_encoder(self) -> None:
        try:
            info = await self._encoder_client.get_info(_CALL_TIMEOUT_S)
        except ChiasmError as error:
            log.debug("encoder_info_unavailable", reason=error.reason)
            return
        known = self.encoder
        self.encoder = info
        if self._make_resolver and (known is None or known.fingerprint != info.fingerprint):
            self.resolver = self._make_resolver(info.fingerprint)
            log.info("encoder_fingerprint_learnt", fingerprint=info.fingerprint.hex()[:16])

    async def _refresh_generator(self) -> None:
        try:
            self.generator = await self._generator_client.get_info(_CALL_TIMEOUT_S)
        except ChiasmError as error:
            log.debug("generator_info_unavailable", reason=error.reason)
