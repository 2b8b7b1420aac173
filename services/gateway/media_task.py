"""See one media item of a request through: known already, or encoded, or encoded again."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog

from chiasm.common.errors import ChiasmError, MediaNotFoundError, UnavailableError
from chiasm.common.media import CacheStatus
from chiasm.common.metrics import GATEWAY_MEDIA_ITEMS

from .encoder_client import ItemChunk, ItemPlanned, ItemReady
from .media_object import MediaReceipt
from .media_query import query_of
from .media_sources import contents_of, is_whole, num_bytes_of

if TYPE_CHECKING:
    from chiasm.common.media import EmbeddingRef, MediaLayout, RequestContext
    from chiasm.common.media_resolver import MediaResolver
    from chiasm.v1 import media_pb2

    from .budgets import ByteBudget
    from .chat_request import MediaItem
    from .deadline import Deadline
    from .encoder_client import EncoderClient

log = structlog.get_logger(__name__)


class EmbeddingSink(Protocol):
    """Where the news of a request's embeddings go: its ``Generate`` call."""

    async def send_ready(self, embedding_id: bytes) -> None:
        """Report that an embedding is in the store now."""
        ...

    async def send_chunk(self, chunk: media_pb2.EmbeddingChunk) -> None:
        """Pass on a piece of an embedding."""
        ...

    async def send_failed(self, embedding_id: bytes, error: ChiasmError) -> None:
        """Report that an embedding cannot be had."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """What the prompt needs of an item; ``is_ready`` if its embedding is in the store."""

    ref: EmbeddingRef
    layout: MediaLayout
    is_ready: bool


@dataclass(frozen=True, slots=True)
class MediaServices:
    """What media tasks work with.

    Attributes:
        encoder: Client of the encoders.
        resolver: Finds what is stored already; ``None`` while the encoders' fingerprint is unknown.
        kept_sources: Bytes of sources that may be kept for encoding again.
    """

    encoder: EncoderClient
    resolver: MediaResolver | None
    kept_sources: ByteBudget


class MediaTask:
    """The work on one media item, running from construction on.

    1. The item is looked up by content or uuid; on a hit it is planned and ready.
    2. Otherwise an encoder plans it, and later stores its embedding or sends it in chunks.
    3. If the generator misses the embedding, it is encoded once more and sent in chunks.

    What happens after the plan goes to the sink given to ``connect``. A failure before the plan is
    raised by ``planned``, one after it is sent to the sink. ``cancel`` ends all work.
    """

    def __init__(
        self,
        item: MediaItem,
        context: RequestContext,
        services: MediaServices,
        inline_ids: set[bytes],
        deadline: Deadline,
    ) -> None:
        """Start work on ``item``; needs a running event loop.

        Args:
            item: The item.
            context: Caller and request.
            services: What to work with.
            inline_ids: Embeddings of this request that some task sends in chunks; shared by its
                tasks, so that items of equal content are sent once.
            deadline: Bound on the whole request.
        """
        self._item = item
        self._context = context
        self._services = services
        self._inline_ids = inline_ids
        self._deadline = deadline
        loop = asyncio.get_running_loop()
        self._planned: asyncio.Future[PlannedItem] = loop.create_future()
        self._sink: asyncio.Future[EmbeddingSink] = loop.create_future()
        self._num_kept_bytes = self._keep_source()
        self._has_resent = False
        self._ready: ItemReady | None = None
        self._works = {asyncio.create_task(self._run(), name=f"media {item.param}")}

    @property
    def embedding_id(self) -> bytes | None:
        """Id of the item's embedding; ``None`` before the plan."""
        is_known = self._planned.done() and self._planned.exception() is None
        return self._planned.result().ref.embedding_id if is_known else None

    def receipt(self) -> MediaReceipt:
        """Tell how the item came to be available; it must be planned.

        The last words of an embedding may come after the answer has ended, its times among them;
        then they are 0.
        """
        planned = self._planned.result()
        expected = CacheStatus.HIT if planned.is_ready else CacheStatus.MISS
        ready = self._ready or ItemReady(expected)
        return MediaReceipt(
            uuid=self._item.uuid,
            modality=self._item.modality,
            num_tokens=planned.layout.num_tokens,
            cache_status=ready.cache_status,
            fetch_s=ready.fetch_s,
            decode_s=ready.decode_s,
            encode_s=ready.encode_s,
        )

    @property
    def has_source(self) -> bool:
        """Whether the item could be encoded now: its bytes are still there, or it has a URL."""
        return is_whole(self._item.source)

    async def planned(self) -> PlannedItem:
        """Return the item's plan.

        Raises:
            ChiasmError: The item cannot be had.
        """
        return await asyncio.shield(self._planned)

    def connect(self, sink: EmbeddingSink) -> None:
        """Send what happens after the plan to ``sink``."""
        self._sink.set_result(sink)

    def resend(self) -> None:
        """Have the embedding encoded again and sent in chunks; the second time fails."""
        self._works.add(asyncio.create_task(self._resend(), name=f"resend {self._item.param}"))

    def release_source(self) -> None:
        """Forget the source: the generator has the embedding."""
        self._drop_source()
        self._services.kept_sources.release(self._num_kept_bytes)
        self._num_kept_bytes = 0

    def cancel(self) -> None:
        """Cancel what is still going on and forget the source."""
        for work in self._works:
            work.cancel()
        # Nobody connects any more: work whose cancellation was lost must not wait for that.
        self._sink.cancel()
        self._planned.cancel()
        if not self._planned.cancelled():
            self._planned.exception()  # marks it as seen
        self.release_source()

    async def wait_ended(self) -> None:
        """Return when all work has ended; ``cancel`` comes first."""
        await asyncio.gather(*self._works, return_exceptions=True)

    def _keep_source(self) -> int:
        size = num_bytes_of(self._item.source)
        return size if self._services.kept_sources.reserve(size) else 0

    async def _run(self) -> None:
        try:
            stored = await self._find_stored()
            if stored is not None:
                self._note(ItemReady(CacheStatus.HIT))
                self._plan(stored)
            else:
                await self._encode(inline=False)
            self._drop_source_unless_kept()
        except ChiasmError as error:
            await self._fail(error)
        except Exception as error:  # top of a background task: ends the request
            log.exception("media_task_failed", request_id=self._context.request_id)
            await self._fail(error)

    async def _find_stored(self) -> PlannedItem | None:
        resolver = self._services.resolver
        if resolver is None:
            return None
        query = await query_of(self._item)
        if query is None:
            return None
        stored = (await resolver.resolve(self._context, query)).stored
        return None if stored is None else PlannedItem(stored.ref, stored.layout, is_ready=True)

    async def _encode(self, *, inline: bool) -> None:
        events = self._services.encoder.encode(
            self._item, self._context, self._deadline, inline=inline
        )
        sends_chunks = False
        async with aclosing(events):
            async for event in events:
                if isinstance(event, ItemPlanned):
                    is_ready = event.cache_status is CacheStatus.HIT
                    self._plan(PlannedItem(event.ref, event.layout, is_ready))
                elif isinstance(event, ItemChunk):
                    self._note(ItemReady(CacheStatus.INLINE))  # its times come last
                    sends_chunks = sends_chunks or self._claim_inline()
                    if sends_chunks:
                        await (await self._sink).send_chunk(event.chunk)
                elif isinstance(event, ItemReady):
                    await self._finish(event)

    def _plan(self, planned: PlannedItem) -> None:
        if not self._planned.done():
            self._planned.set_result(planned)

    async def _finish(self, event: ItemReady) -> None:
        self._note(event)
        planned = await self.planned()
        if event.cache_status is not CacheStatus.INLINE and not planned.is_ready:
            await (await self._sink).send_ready(planned.ref.embedding_id)

    def _claim_inline(self) -> bool:
        embedding_id = self.embedding_id
        if embedding_id is None or embedding_id in self._inline_ids:
            return False
        self._inline_ids.add(embedding_id)
        return True

    async def _resend(self) -> None:
        try:
            if self._has_resent or not self.has_source:
                raise self._lost()
            self._has_resent = True
            self._inline_ids.discard((await self.planned()).ref.embedding_id)
            await self._encode(inline=True)
        except ChiasmError as error:
            await self._fail(error)
        except Exception as error:  # top of a background task: ends the request
            log.exception("media_resend_failed", request_id=self._context.request_id)
            await self._fail(error)

    def _lost(self) -> ChiasmError:
        if self._item.source is None:
            return MediaNotFoundError(
                f"Cache miss for {self._item.modality.value} at index {self._item.index} but"
                " data is not provided.",
                param=self._item.param,
            )
        return UnavailableError(
            "The embedding was evicted; please try again.",
            reason="EMBEDDING_EXPIRED",
            param=self._item.param,
            retry_after_s=1.0,
        )

    async def _fail(self, error: Exception) -> None:
        if not self._planned.done():
            self._planned.set_exception(error)
            return
        known = error if isinstance(error, ChiasmError) else ChiasmError("The server failed.")
        sink = await self._sink
        await sink.send_failed(self._planned.result().ref.embedding_id, known)

    def _drop_source_unless_kept(self) -> None:
        if not self._num_kept_bytes:
            self._drop_source()

    def _drop_source(self) -> None:
        for content in contents_of(self._item.source):
            content.release()

    def _note(self, ready: ItemReady) -> None:
        before, self._ready = self._ready, ready
        if before is None or before.cache_status is not ready.cache_status:
            GATEWAY_MEDIA_ITEMS.labels(self._item.modality.value, ready.cache_status.value).inc()
