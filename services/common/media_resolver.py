"""Tell which embedding a media item of a request means, by its content or by the client's uuid.

The rules, for an item with data (bytes whose digest is known, or a URL) or without (null media):

====  ======  ==============  ===============================================================
uuid  data    alias           answer
====  ======  ==============  ===============================================================
no    none    -               ``InvalidRequestError``
no    URL     -               fetch, then resolve again with the digest
no    digest  -               stored or to be encoded
yes   none    unknown         ``MediaNotFoundError``
yes   none    known           stored, else ``MediaNotFoundError``
yes   URL     same URL        stored, else fetch and resolve again
yes   URL     other, unknown  fetch, then resolve again with the digest
yes   digest  same digest     stored or to be encoded
yes   digest  other digest    ``ConflictError``
yes   digest  unknown         stored (the alias is bound now) or to be encoded
====  ======  ==============  ===============================================================

New processing options or a new model make another embedding id, so what an alias leads to is never
stale. Null media without options of the client means the item as it was when it was named, with the
options that it had then, whatever else is stored of the same content. Without the store, items with
data are as good as unknown, and null media cannot be told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from chiasm.common.alias_target import AliasRecord, AliasTarget
from chiasm.common.errors import (
    ConflictError,
    InvalidRequestError,
    MediaNotFoundError,
    StoreUnavailableError,
)
from chiasm.common.identity import (
    AliasName,
    EmbeddingSource,
    embedding_id,
    url_digest,
    validate_uuid,
)

if TYPE_CHECKING:
    from chiasm.common.embedding_store import EmbeddingStore, StoredEmbedding
    from chiasm.common.media import Modality, ProcessingOptions, RequestContext
    from chiasm.common.secrets import StoreSecrets

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MediaQuery:
    """What a request says about one media item.

    Attributes:
        modality: Kind of the item.
        options: Processing options of the client and of the operator.
        uuid: The client's name for the item; empty for none.
        source_digest: Digest of the item's bytes or tensor; ``None`` if not known (yet).
        num_bytes: Bytes of the source, if its digest is known; 0 if they were not counted.
        url: URL that the item comes from; empty for none. Data URLs are bytes, not URLs.
        index: Position among the request's items of this modality.
        param: Path of the item in the request, for errors.
        is_plain: Whether the client has no processing options.
    """

    modality: Modality
    options: ProcessingOptions
    uuid: str = ""
    source_digest: bytes | None = None
    num_bytes: int = 0
    url: str = ""
    index: int = 0
    param: str = ""
    is_plain: bool = False

    @property
    def has_data(self) -> bool:
        """Whether the item can be encoded, so that a miss is no error."""
        return self.source_digest is not None or bool(self.url)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What is known of an item.

    Attributes:
        embedding_id: Id of its embedding; ``None`` if the source must be fetched to know it.
        source_digest: Digest of its source; ``None`` exactly if ``embedding_id`` is.
        stored: The embedding's ref and layout if it is in the store.
        ttl_s: Seconds that the item's name asks for after each use; 0: as the store keeps
            everything.
    """

    embedding_id: bytes | None
    source_digest: bytes | None
    stored: StoredEmbedding | None
    ttl_s: int = 0

    @property
    def is_hit(self) -> bool:
        """Whether nothing has to be fetched or encoded."""
        return self.stored is not None


class MediaResolver:
    """The rules above for one model, over one store.

    The gateway uses it to answer hits without an encoder, the encoder to decide. ``fingerprint`` is
    the encoder's; a new encoder needs a new resolver.
    """

    def __init__(self, store: EmbeddingStore, secrets: StoreSecrets, fingerprint: bytes) -> None:
        self._store = store
        self._secrets = secrets
        self._fingerprint = fingerprint

    async def resolve(self, context: RequestContext, query: MediaQuery) -> Resolution:
        """Return what is known of the item, by the rules above.

        Raises:
            InvalidRequestError: Null media without a uuid, or a uuid of wrong form.
            ConflictError: The uuid is bound to other content.
            MediaNotFoundError: Null media whose uuid is unknown, or whose embedding is gone.
            StoreUnavailableError: Null media while the store cannot be used.
        """
        if query.uuid:
            validate_uuid(query.uuid, query.param)
        elif not query.has_data:
            name = f"['{query.modality.value}'][{query.index}]"
            raise InvalidRequestError(
                f"multi_modal_data{name} is empty but multi_modal_uuids{name} is missing.",
                reason="MEDIA_MISSING",
                param=query.param or "multi_modal_uuids",
            )
        try:
            return await self._resolve(context, query)
        except StoreUnavailableError:
            if not query.has_data:
                raise
            return self._without_store(context, query)

    async def bind(
        self,
        context: RequestContext,
        query: MediaQuery,
        source_digest: bytes,
        num_tokens: int = 0,
    ) -> bool:
        """Bind the item's uuid to the source that was encoded for it; does nothing without a uuid.

        Call it when the item has proved to be valid, before telling anyone that it is ready.

        Args:
            context: Who asks.
            query: The item.
            source_digest: Digest of its source.
            num_tokens: Tokens that it takes in a prompt, for those who ask what there is.

        Returns:
            Whether the uuid leads to the source from now on: ``False`` without a uuid or a store.

        Raises:
            ConflictError: The uuid is bound to other content, perhaps since a moment ago.
        """
        found_id = self.embedding_id(context, query, source_digest)
        return await self._bind(context, query, source_digest, found_id, num_tokens)

    def embedding_id(
        self, context: RequestContext, query: MediaQuery, source_digest: bytes
    ) -> bytes:
        """Return the id under which the embedding of the item is stored if encoded now."""
        return self.embedding_ids(context, query, source_digest)[0]

    def embedding_ids(
        self, context: RequestContext, query: MediaQuery, source_digest: bytes
    ) -> list[bytes]:
        """Return all ids that the embedding may be stored under: one per secret, newest first."""
        source = self._source(context, query, source_digest)
        generations = self._secrets.generations(context.tenant)
        return [embedding_id(keys, source) for keys in generations]

    async def _bind(
        self,
        context: RequestContext,
        query: MediaQuery,
        source_digest: bytes,
        found_id: bytes,
        num_tokens: int,
    ) -> bool:
        if not query.uuid:
            return False
        record = AliasRecord(
            uuid=query.uuid,
            modality=query.modality,
            cache_salt=context.cache_salt,
            embedding_id=found_id,
            fingerprint=self._fingerprint,
            num_bytes=query.num_bytes,
            num_tokens=num_tokens,
            created_s=int(time.time()),
        )
        target = AliasTarget(source_digest, url_digest(query.url) if query.url else b"", record)
        try:
            name = _alias_name(context, query)
            bound = await self._store.aliases.bind(context.tenant, name, target)
        except StoreUnavailableError:
            log.warning("alias_not_bound", request_id=context.request_id)
            return False
        _check_same(query, bound, source_digest)
        return True

    async def _resolve(self, context: RequestContext, query: MediaQuery) -> Resolution:
        target = None
        if query.uuid:
            name = _alias_name(context, query)
            target = await self._store.aliases.read(context.tenant, name)
        if query.source_digest is not None:
            _check_same(query, target, query.source_digest)
        resolution = await self._find_target(context, query, target)
        ttl_s = target.ttl_s if target is not None else 0
        if query.uuid and resolution.stored is not None:
            await self._store.keep_at_least(context.tenant, resolution.stored, ttl_s)
        return replace(resolution, ttl_s=ttl_s)

    async def _find_target(
        self, context: RequestContext, query: MediaQuery, target: AliasTarget | None
    ) -> Resolution:
        if query.source_digest is not None:
            resolution = await self._find(context, query, query.source_digest)
            if resolution.stored is not None and resolution.embedding_id is not None:
                num_tokens = resolution.stored.layout.num_tokens
                await self._bind(
                    context, query, query.source_digest, resolution.embedding_id, num_tokens
                )
            return resolution
        if not query.url:
            return await self._find_null_media(context, query, target)
        if target is not None and target.url_digest == url_digest(query.url):
            resolution = await self._find(context, query, target.source_digest)
            if resolution.is_hit:
                return resolution
        return Resolution(None, None, None)

    async def _find_null_media(
        self, context: RequestContext, query: MediaQuery, target: AliasTarget | None
    ) -> Resolution:
        if target is not None:
            resolution = await self._find_as_named(context, query, target)
            if not resolution.is_hit:
                resolution = await self._find(context, query, target.source_digest)
            if resolution.is_hit:
                return resolution
        raise MediaNotFoundError(
            f"Cache miss for {query.modality.value} at index {query.index} but data is not"
            " provided.",
            param=query.param,
        )

    async def _find_as_named(
        self, context: RequestContext, query: MediaQuery, target: AliasTarget
    ) -> Resolution:
        """Find the embedding that the item had when it was named, if the client has no options."""
        record = target.record
        if not query.is_plain or record is None or record.fingerprint != self._fingerprint:
            return Resolution(None, None, None)
        stored = await self._store.lookup(context.tenant, record.embedding_id)
        return Resolution(record.embedding_id, target.source_digest, stored)

    async def _find(
        self, context: RequestContext, query: MediaQuery, source_digest: bytes
    ) -> Resolution:
        possible_ids = self.embedding_ids(context, query, source_digest)
        for found_id in possible_ids:
            stored = await self._store.lookup(context.tenant, found_id)
            if stored is not None:
                return Resolution(found_id, source_digest, stored)
        return Resolution(possible_ids[0], source_digest, None)

    def _without_store(self, context: RequestContext, query: MediaQuery) -> Resolution:
        if query.source_digest is None:
            return Resolution(None, None, None)
        found_id = self.embedding_id(context, query, query.source_digest)
        return Resolution(found_id, query.source_digest, None)

    def _source(
        self, context: RequestContext, query: MediaQuery, source_digest: bytes
    ) -> EmbeddingSource:
        return EmbeddingSource(
            fingerprint=self._fingerprint,
            modality=query.modality,
            options=query.options,
            cache_salt=context.cache_salt,
            source_digest=source_digest,
        )


def _alias_name(context: RequestContext, query: MediaQuery) -> AliasName:
    return AliasName(query.modality, context.cache_salt, query.uuid)


def _check_same(query: MediaQuery, target: AliasTarget | None, source_digest: bytes) -> None:
    if target is not None and target.source_digest != source_digest:
        raise ConflictError(
            f"The uuid of the {query.modality.value} at index {query.index} is bound to other"
            " content; use a new uuid for new content.",
            param=query.param,
        )
