"""Keep media items under names: put, get, delete, page, estimate, forget."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiasm.common.alias_target import AliasRecord
from chiasm.common.errors import (
    DeadlineExceededError,
    NotFoundError,
    StoreUnavailableError,
)
from chiasm.common.identity import AliasName
from chiasm.common.limits import clamp
from chiasm.common.logging import bind_request_id
from chiasm.common.media import CacheStatus, Modality, ProcessingOptions, RequestContext
from chiasm.common.media_resolver import MediaQuery
from chiasm.common.metrics import GATEWAY_MEDIA_ITEMS

from .deadline import Deadline
from .encoder_client import ItemChunk, ItemPlanned
from .media_object import MediaEstimate, MediaObject, MediaPage, MediaReceipt, PutMedia
from .media_query import query_of
from .media_sources import num_bytes_of
from .prompt_checks import check_media

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.alias_store import PeekedAlias
    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.media import EmbeddingRef, MediaLayout
    from chiasm.common.media_resolver import MediaResolver

    from .chat_request import Caller, MediaItem
    from .encoder_client import EncoderClient, ItemReady
    from .media_object import MediaName, MediaRequest, PageRequest
    from .media_policy import MediaPolicy
    from .served_model import ServedModel
    from .stack_info import StackInfo


class MediaLibrary:
    """The named media items of all tenants; what it knows of them stands in the store.

    An item is an alias and the embedding that it leads to. It is there as long as both are, and as
    long as the encoders' fingerprint is the one that it was encoded under.
    """

    def __init__(
        self,
        model: ServedModel,
        stack: StackInfo,
        encoder: EncoderClient,
        store: EmbeddingStore | None,
        ttl_s: tuple[float, float],
    ) -> None:
        """Take the parts.

        Args:
            model: The served model.
            stack: What is known of the encoders.
            encoder: Client of the encoders.
            store: The embedding store; without one nothing can be kept.
            ttl_s: Seconds that items are kept after each use: unless they ask, and at most.
        """
        self._model = model
        self._stack = stack
        self._encoder = encoder
        self._store = store
        self._default_ttl_s, self._max_ttl_s = int(ttl_s[0]), int(ttl_s[1])

    @property
    def policy(self) -> MediaPolicy:
        """What the server allows of media."""
        return self._model.media_policy

    async def put(self, request: MediaRequest, caller: Caller) -> PutMedia:
        """Encode an item unless it is stored already, and keep it under its name.

        The embedding is kept as long as the item asks, or longer if it was there before.

        Raises:
            ChiasmError: The item is refused or could not be encoded.
            ConflictError: The name is bound to other content.
            StoreUnavailableError: It could not be kept.
        """
        deadline = Deadline.after(caller.timeout_s)
        store, context = self._require_store(), self._context(request, caller.tenant)
        self._check(request)
        item = request.item
        if not item.uuid:
            item = replace(item, uuid=f"media-{uuid.uuid4().hex}")
        if not await store.ping():
            raise _not_kept()  # before the tower has worked for nothing
        query = await query_of(item)
        encoded = await self._encode(item, query, context, deadline)
        ref, receipt = encoded.ref, encoded.receipt
        record = AliasRecord(
            uuid=item.uuid,
            modality=item.modality,
            cache_salt=context.cache_salt,
            embedding_id=ref.embedding_id,
            fingerprint=ref.fingerprint,
            num_bytes=num_bytes_of(item.source),
            num_tokens=receipt.num_tokens,
            created_s=int(time.time()),
            ttl_s=0 if request.ttl_s is None else clamp(self._max_ttl_s, request.ttl_s),
        )
        name = AliasName(item.modality, context.cache_salt, item.uuid)
        await store.aliases.describe(caller.tenant, name, record)
        is_new = receipt.cache_status is CacheStatus.MISS
        await store.set_ttl(caller.tenant, ref.embedding_id, record.ttl_s, may_shorten=is_new)
        peeked = await store.aliases.peek(caller.tenant, name)
        media = await self._describe(caller.tenant, [peeked] if peeked else [])
        if not media:
            raise _not_kept()
        return PutMedia(media[0], receipt)

    async def get(self, name: MediaName, tenant: str) -> MediaObject:
        """Return the item that ``name`` names; this is no use of it.

        Raises:
            NotFoundError: There is none.
            StoreUnavailableError: The store cannot be used now.
        """
        found = await self._find(name, tenant)
        media = await self._describe(tenant, [peeked for _, peeked in found])
        if not media:
            raise _not_found(name)
        return media[0]

    async def delete(self, name: MediaName, tenant: str) -> None:
        """Forget the item that ``name`` names.

        Its embedding goes too, so that nothing of the content stays; other names of the same
        content lose it with that. Embeddings of it under options that no name was put with stay
        until their time ends.

        Raises:
            NotFoundError: There is none.
            StoreUnavailableError: The store cannot be used now.
        """
        store, resolver = self._require_store(), self._require_resolver()
        context = RequestContext("", "", tenant, cache_salt=name.cache_salt)
        found = await self._find(name, tenant)
        if not found:
            raise _not_found(name)
        alias, target = found[0][0], found[0][1].target
        plain = MediaQuery(alias.modality, ProcessingOptions())
        embedding_ids = set(resolver.embedding_ids(context, plain, target.source_digest))
        if target.record is not None:
            embedding_ids.add(target.record.embedding_id)
        await store.aliases.delete(tenant, alias)
        for embedding_id in embedding_ids:
            await store.delete(tenant, embedding_id)

    async def page(self, tenant: str, request: PageRequest) -> MediaPage:
        """Return a page of the tenant's items that were put with the salt.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        store = self._require_store()
        page = await store.tenants.alias_hashes(tenant, request.start, request.max_items)
        peeked = await store.aliases.peek_hashes(tenant, page.hashes)
        salts = [one.target.record.cache_salt if one.target.record else None for one in peeked]
        ours = [one for one, salt in zip(peeked, salts, strict=True) if salt == request.cache_salt]
        media = await self._describe(tenant, ours)
        return MediaPage(tuple(media), str(page.next_cursor) if page.next_cursor else "")

    async def estimate(self, request: MediaRequest, caller: Caller) -> MediaEstimate:
        """Tell what an item would cost; nothing is encoded, stored or named.

        Raises:
            ChiasmError: The item is refused.
            NotFoundError: It has no source, and nothing is kept under its uuid.
        """
        deadline = Deadline.after(caller.timeout_s)
        context = self._context(request, caller.tenant)
        self._check(request)
        item = request.item
        if item.source is not None:
            item = replace(item, uuid="")
        resolver = self._stack.resolver
        query = await query_of(item)
        if resolver is not None and query is not None:
            stored = (await resolver.resolve(context, query)).stored
            if stored is not None:
                return MediaEstimate(stored.layout.num_tokens, 0, 0, CacheStatus.HIT)
        plan = await self._encoder.plan(item, context, deadline)
        return MediaEstimate(
            plan.num_tokens, plan.num_pixels, plan.num_queue_pixels, CacheStatus.MISS
        )

    async def forget(self, caller: Caller) -> int:
        """Forget everything of the caller's tenant; return how many named items that were.

        Raises:
            StoreUnavailableError: The store cannot be used now; a part may be forgotten.
            DeadlineExceededError: There was too much for the time; a part is forgotten.
        """
        store = self._require_store()
        try:
            async with asyncio.timeout(caller.timeout_s):
                return await store.tenants.forget(caller.tenant)
        except TimeoutError:
            raise DeadlineExceededError(
                "Not everything could be forgotten in time; send the request again."
            ) from None

    def _check(self, request: MediaRequest) -> None:
        self._model.check_name(request.model)
        check_media([request.item], self._stack.require_encoder().modalities, {})

    def _context(self, request: MediaRequest, tenant: str) -> RequestContext:
        bind_request_id(request.request_id)
        return RequestContext(
            request_id=request.request_id,
            attempt_id=uuid.uuid4().hex,
            tenant=tenant,
            model=self._model.name,
            cache_salt=request.cache_salt,
        )

    def _require_store(self) -> EmbeddingStore:
        if self._store is None:
            raise StoreUnavailableError(
                "Media cannot be kept: this server was started without --redis-url."
            )
        return self._store

    def _require_resolver(self) -> MediaResolver:
        self._stack.require_encoder()
        self._require_store()
        assert self._stack.resolver is not None, "a store and an encoder make a resolver"
        return self._stack.resolver

    async def _encode(
        self,
        item: MediaItem,
        query: MediaQuery | None,
        context: RequestContext,
        deadline: Deadline,
    ) -> _Encoded:
        """Have an item encoded and stored under its name, unless it is."""
        encoded = stored = None
        resolver = self._require_resolver()
        if query is not None:
            stored = (await resolver.resolve(context, query)).stored
        if stored is not None:
            encoded = _Encoded(stored.ref, _receipt(item, stored.layout, CacheStatus.HIT))
        else:
            planned = None
            events = self._encoder.encode(item, context, deadline, inline=False)
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, ItemPlanned):
                        planned = event
                    elif isinstance(event, ItemChunk):
                        raise _not_kept()
                    elif planned is not None:
                        encoded = _Encoded(planned.ref, _encoded_receipt(item, planned, event))
        assert encoded is not None, "an encode ends with a plan and a ready embedding, or an error"
        status = encoded.receipt.cache_status
        GATEWAY_MEDIA_ITEMS.labels(item.modality.value, status.value).inc()
        return encoded

    async def _find(self, name: MediaName, tenant: str) -> list[tuple[AliasName, PeekedAlias]]:
        """Return what the uuid stands for, by kind."""
        store = self._require_store()
        modalities = [name.modality] if name.modality else list(Modality)
        aliases = [AliasName(modality, name.cache_salt, name.uuid) for modality in modalities]
        peeked = [(alias, await store.aliases.peek(tenant, alias)) for alias in aliases]
        return [(alias, found) for alias, found in peeked if found is not None]

    async def _describe(self, tenant: str, aliases: Sequence[PeekedAlias]) -> list[MediaObject]:
        """Describe those whose embedding is there and of the encoders' fingerprint."""
        store, fingerprint = self._require_store(), self._stack.require_encoder().fingerprint
        records = [
            (alias.target.record, alias.left_s)
            for alias in aliases
            if alias.target.record is not None and alias.target.record.fingerprint == fingerprint
        ]
        seconds_left = await store.seconds_left(
            tenant, [record.embedding_id for record, _ in records]
        )
        now_s = time.time()
        return [
            MediaObject(
                uuid=record.uuid,
                modality=record.modality,
                num_tokens=record.num_tokens,
                num_bytes=record.num_bytes,
                created_s=record.created_s,
                expires_s=int(now_s + min(alias_left_s, left_s)),
                ttl_s=record.ttl_s or self._default_ttl_s,
            )
            for (record, alias_left_s), left_s in zip(records, seconds_left, strict=True)
            if left_s > 0
        ]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """An embedding that is in the store, and how it came there."""

    ref: EmbeddingRef
    receipt: MediaReceipt


def _receipt(item: MediaItem, layout: MediaLayout, status: CacheStatus) -> MediaReceipt:
    return MediaReceipt(item.uuid, item.modality, layout.num_tokens, status)


def _encoded_receipt(item: MediaItem, planned: ItemPlanned, ready: ItemReady) -> MediaReceipt:
    return replace(
        _receipt(item, planned.layout, ready.cache_status),
        fetch_s=ready.fetch_s,
        decode_s=ready.decode_s,
        encode_s=ready.encode_s,
    )


def _not_kept() -> StoreUnavailableError:
    return StoreUnavailableError(
        "The embedding store cannot be used now; the media item was not kept.", retry_after_s=1.0
    )


def _not_found(name: MediaName) -> NotFoundError:
    return NotFoundError(
        f"There is no media item with the uuid `{name.uuid}`.",
        reason="MEDIA_NOT_FOUND",
        param="uuid",
    )
