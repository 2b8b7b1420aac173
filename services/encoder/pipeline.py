"""Answer one encode call: what is the item, is it known, what does it become, where is it now."""

from __future__ import annotations

from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import structlog

from chiasm.common.data_url import is_data_url
from chiasm.common.embedding_store import StoredEmbedding
from chiasm.common.errors import (
    ChiasmError,
    InvalidRequestError,
    MediaNotFoundError,
    StoreUnavailableError,
)
from chiasm.common.logging import bind_request_id
from chiasm.common.media import (
    CacheStatus,
    Embedding,
    EmbeddingRef,
    ProcessingOptions,
    TensorRole,
    TensorSpec,
)
from chiasm.common.media_resolver import MediaQuery
from chiasm.common.metrics import ENCODER_REJECTED_ITEMS
from chiasm.encoder.commands import (
    Delivery,
    FramesSource,
    ItemChunk,
    ItemEstimate,
    ItemPlanned,
    ItemReady,
    StageTimings,
    TensorFileSource,
    TensorSource,
    UrlSource,
)
from chiasm.encoder.ready_embeddings import ReadyItem, ReadyTensor
from chiasm.encoder.source_reader import SourceData
from chiasm.encoder.tower import bytes_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.media_resolver import MediaResolver, Resolution
    from chiasm.common.single_flight import SingleFlight
    from chiasm.encoder.admission import Admission, AdmissionTicket
    from chiasm.encoder.commands import EncodeCommand, EncodeEvent, EncoderDescription
    from chiasm.encoder.frames_reader import FramesReader
    from chiasm.encoder.item_encoder import Encoded, ItemEncoder
    from chiasm.encoder.preprocess import PlannedItem
    from chiasm.encoder.ready_embeddings import ReadyEmbeddings
    from chiasm.encoder.source_reader import SourceReader

log = structlog.get_logger(__name__)

CHUNK_BYTES = 1 << 20
_MAX_RGB = 0xFFFFFF


@dataclass(frozen=True, slots=True)
class PipelineParts:
    """What the pipeline works with."""

    admission: Admission
    resolver: MediaResolver
    store: EmbeddingStore
    flights: SingleFlight[Encoded]
    reader: SourceReader
    frames: FramesReader
    ready: ReadyEmbeddings
    encoder: ItemEncoder


class EncodePipeline:
    """The way of one item through the encoder.

    1. admit: over the bounds the item is refused before any work;
    2. resolve by uuid or URL; a hit answers at once, without the source;
    3. read the source and resolve by its digest;
    4. plan from the header and tell it: ``ItemPlanned``;
    5. encode, unless another call or process does: ``SingleFlight``;
    6. bind the uuid, then tell where the embedding is: ``ItemReady`` or chunks and ``ItemReady``.

    Cancelling a call frees all it held; an encode that others wait for goes on.
    """

    def __init__(self, parts: PipelineParts, description: EncoderDescription) -> None:
        self._parts = parts
        self._description = description

    async def run(self, command: EncodeCommand) -> AsyncGenerator[EncodeEvent, None]:
        """Encode one item.

        Yields:
            ``ItemPlanned`` first, ``ItemReady`` last, ``ItemChunk`` between if the embedding
            travels inline.

        Raises:
            ChiasmError: The item is refused, or could not be encoded.
        """
        bind_request_id(command.context.request_id)
        try:
            self._check(command)
            with self._parts.admission.admit() as ticket:
                async with aclosing(self._run(command, ticket)) as events:
                    async for event in events:
                        if isinstance(event, ItemReady):
                            _log_ready(command, event)
                        yield event
        except ChiasmError as error:
            ENCODER_REJECTED_ITEMS.labels(command.modality.value, error.reason).inc()
            raise

    async def plan(self, command: EncodeCommand) -> ItemEstimate:
        """Return the layout of an item and what encoding it costs; nothing is encoded or stored.

        Raises:
            ChiasmError: The item is refused.
        """
        self._check(command)
        with self._parts.admission.admit() as ticket:
            query = _query(command)
            resolution = await self._resolve_unread(command, query)
            if resolution is not None and resolution.stored is not None:
                return ItemEstimate(resolution.stored.layout)
            source = await self._read(command, ticket)
            item = await self._plan(command, source, ticket)
            return ItemEstimate(item.layout, item.num_tower_pixels, item.num_pixels)

    def _check(self, command: EncodeCommand) -> None:
        modality = command.modality
        if modality not in self._description.placeholders:
            raise InvalidRequestError(
                f"At most 0 {modality.value}(s) may be provided in one prompt.",
                reason="UNSUPPORTED_MODALITY",
                param=modality.value,
            )
        background_rgb = command.options.background_rgb
        if background_rgb is not None and background_rgb > _MAX_RGB:
            raise InvalidRequestError(
                "background_rgb must be at most 0xFFFFFF.", param="options.background_rgb"
            )

    async def _run(
        self, command: EncodeCommand, ticket: AdmissionTicket
    ) -> AsyncGenerator[EncodeEvent, None]:
        query = _query(command)
        resolution = await self._resolve_unread(command, query)
        if resolution is not None:
            events = await self._answer_from_store(command, resolution)
            if events is not None:
                for event in events:
                    yield event
                return
        source = await self._read(command, ticket)
        query = replace(query, source_digest=source.digest, num_bytes=source.num_bytes)
        resolution = await self._parts.resolver.resolve(command.context, query)
        events = await self._answer_from_store(command, resolution)
        if events is None:
            assert resolution.embedding_id is not None, "the digest is known"
            item = await self._plan(command, source, ticket)
            ticket.queue_work(resolution.embedding_id, item.num_pixels)
            ref = self._ref(command, resolution.embedding_id, item)
            yield ItemPlanned(ref, item.layout, CacheStatus.MISS)
            events = await self._encode(command, item, ref, source, resolution.ttl_s)
            num_tokens = item.layout.num_tokens
            await self._parts.resolver.bind(command.context, query, source.digest, num_tokens)
        for event in events:
            yield event

    async def _resolve_unread(self, command: EncodeCommand, query: MediaQuery) -> Resolution | None:
        """Return what uuid and URL tell; ``None`` if the source has to be read to know more."""
        if command.source is not None and not command.uuid:
            return None
        if command.source is not None and not query.url:
            return None
        resolution = await self._parts.resolver.resolve(command.context, query)
        return resolution if resolution.is_hit else None

    async def _read(
        self, command: EncodeCommand, ticket: AdmissionTicket
    ) -> SourceData | ReadyTensor:
        if command.source is None:
            # It was a hit a moment ago; the store has lost it since.
            raise MediaNotFoundError(
                f"Cache miss for {command.modality.value} at index 0 but data is not provided."
            )
        if isinstance(command.source, TensorSource | TensorFileSource):
            return await self._parts.ready.read(command.source, command.modality, ticket)
        if isinstance(command.source, FramesSource):
            return await self._parts.frames.read(command.source, ticket)
        return await self._parts.reader.read(command.source, command.modality, ticket)

    async def _plan(
        self, command: EncodeCommand, source: SourceData | ReadyTensor, ticket: AdmissionTicket
    ) -> PlannedItem | ReadyItem:
        if isinstance(source, ReadyTensor):
            return await self._parts.ready.plan(source, command, ticket)
        item = await self._parts.encoder.plan(command.modality, source.memory, command.options)
        ticket.charge_pixels(item.num_pixels)
        return item

    async def _answer_from_store(
        self, command: EncodeCommand, resolution: Resolution
    ) -> list[EncodeEvent] | None:
        """Return the answer to a hit; ``None`` if the item has to be encoded."""
        stored = resolution.stored
        if stored is None:
            return None
        planned = ItemPlanned(stored.ref, stored.layout, CacheStatus.HIT)
        if command.delivery is Delivery.STORE:
            return [planned, ItemReady(CacheStatus.HIT, stored.ref.num_bytes, StageTimings())]
        embedding = await self._get(command, stored.ref)
        if embedding is None:
            return None
        return [planned, *_inline(embedding, StageTimings())]

    async def _encode(
        self,
        command: EncodeCommand,
        item: PlannedItem | ReadyItem,
        ref: EmbeddingRef,
        source: SourceData | ReadyTensor,
        ttl_s: int,
    ) -> list[EncodeEvent]:
        tenant = command.context.tenant
        fetch_s = source.fetch_s if isinstance(source, SourceData) else 0.0
        outcome = await self._parts.flights.run(
            tenant, ref.embedding_id, lambda: self._make(tenant, item, ref, ttl_s)
        )
        if command.uuid:
            stored = StoredEmbedding(ref, item.layout, outcome.ttl_s)
            await self._keep_at_least(tenant, stored, ttl_s)
        if isinstance(outcome, StoredEmbedding):
            if command.delivery is Delivery.STORE:
                return [ItemReady(CacheStatus.HIT, ref.num_bytes, StageTimings(fetch_s=fetch_s))]
            embedding = await self._get(command, ref)
            if embedding is not None:
                return list(_inline(embedding, StageTimings(fetch_s=fetch_s)))
            outcome = await self._make(tenant, item, ref, ttl_s)
        timings = replace(outcome.timings, fetch_s=fetch_s)
        if outcome.is_stored and command.delivery is Delivery.STORE:
            return [ItemReady(CacheStatus.MISS, ref.num_bytes, timings)]
        return list(_inline(outcome.embedding, timings))

    async def _keep_at_least(self, tenant: str, stored: StoredEmbedding, ttl_s: int) -> None:
        """Keep what may have been encoded for another name as long as this one asks."""
        with suppress(StoreUnavailableError):
            await self._parts.store.keep_at_least(tenant, stored, ttl_s)

    async def _make(
        self, tenant: str, item: PlannedItem | ReadyItem, ref: EmbeddingRef, ttl_s: int
    ) -> Encoded:
        encoder = self._parts.encoder
        if isinstance(item, ReadyItem):
            embedding = Embedding(ref, [bytes_of(item.rows)])
            return await encoder.keep(tenant, embedding, item.layout, StageTimings(), ttl_s)
        return await encoder.encode(tenant, item, ref, ttl_s)

    async def _get(self, command: EncodeCommand, ref: EmbeddingRef) -> Embedding | None:
        try:
            return await self._parts.store.get(command.context.tenant, ref)
        except StoreUnavailableError:
            return None

    def _ref(
        self, command: EncodeCommand, embedding_id: bytes, item: PlannedItem | ReadyItem
    ) -> EmbeddingRef:
        description = self._description
        shape = (item.layout.num_embedding_tokens, description.hidden_size)
        deepstack = [
            TensorSpec(TensorRole.DEEPSTACK, description.data_type, shape, level)
            for level in range(description.num_deepstack_levels)
        ]
        return EmbeddingRef(
            embedding_id=embedding_id,
            fingerprint=description.fingerprint,
            modality=command.modality,
            tensors=(TensorSpec(TensorRole.SPLICE, description.data_type, shape), *deepstack),
        )


def _log_ready(command: EncodeCommand, ready: ItemReady) -> None:
    log.info(
        "item_ready",
        modality=command.modality.value,
        cache_status=ready.cache_status.value,
        num_bytes=ready.num_bytes,
        **{name: round(seconds, 4) for name, seconds in asdict(ready.timings).items()},
    )


def _query(command: EncodeCommand) -> MediaQuery:
    source = command.source
    is_remote = isinstance(source, UrlSource) and not is_data_url(source.url)
    return MediaQuery(
        modality=command.modality,
        options=command.options,
        uuid=command.uuid,
        url=source.url if isinstance(source, UrlSource) and is_remote else "",
        is_plain=command.options == ProcessingOptions(),
    )


def _inline(embedding: Embedding, timings: StageTimings) -> Iterator[EncodeEvent]:
    ref = embedding.ref
    last = len(embedding.buffers) - 1
    for index, buffer in enumerate(embedding.buffers):
        for offset in range(0, len(buffer), CHUNK_BYTES):
            end = offset + CHUNK_BYTES
            yield ItemChunk(
                embedding_id=ref.embedding_id,
                tensor_index=index,
                offset=offset,
                data=buffer[offset:end],
                is_last=index == last and end >= len(buffer),
            )
    yield ItemReady(CacheStatus.INLINE, ref.num_bytes, timings)
