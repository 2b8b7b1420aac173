"""Look stored items up and delete them, by uuid or by the digest of their source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.errors import MediaNotFoundError, StoreUnavailableError
from chiasm.common.identity import AliasName, validate_uuid
from chiasm.common.media_resolver import MediaQuery

if TYPE_CHECKING:
    from chiasm.common.embedding_store import EmbeddingStore, StoredEmbedding
    from chiasm.common.media_resolver import MediaResolver
    from chiasm.encoder.commands import ItemKey


class Catalog:
    """What the store holds of this encoder's embeddings."""

    def __init__(self, store: EmbeddingStore, resolver: MediaResolver) -> None:
        self._store = store
        self._resolver = resolver

    async def lookup(self, key: ItemKey) -> StoredEmbedding:
        """Return the stored embedding that ``key`` names.

        Raises:
            InvalidRequestError: The uuid has a wrong form.
            MediaNotFoundError: It is not stored.
            StoreUnavailableError: The store cannot be used now.
        """
        resolution = await self._resolver.resolve(key.context, _query(key))
        if resolution.stored is not None:
            return resolution.stored
        # The resolver answers "not stored" for known digests even if it could not ask.
        await self._check_store()
        raise MediaNotFoundError(f"The {key.modality.value} is not in the embedding store.")

    async def delete(self, key: ItemKey) -> bool:
        """Forget an item, and its uuid if that names it; tell whether anything was there.

        Raises:
            InvalidRequestError: The uuid has a wrong form.
            StoreUnavailableError: The store cannot be used now.
        """
        tenant = key.context.tenant
        digest, was_bound = key.source_digest, False
        embedding_ids: set[bytes] = set()
        if digest is None:
            validate_uuid(key.uuid, "uuid")
            name = AliasName(key.modality, key.context.cache_salt, key.uuid)
            peeked = await self._store.aliases.peek(tenant, name)
            was_bound = await self._store.aliases.delete(tenant, name)
            digest = peeked.target.source_digest if peeked else None
            if peeked is not None and peeked.target.record is not None:
                embedding_ids.add(peeked.target.record.embedding_id)
        if digest is None:
            return was_bound
        embedding_ids.update(self._resolver.embedding_ids(key.context, _query(key), digest))
        were_stored = [await self._store.delete(tenant, one) for one in embedding_ids]
        return was_bound or any(were_stored)

    async def _check_store(self) -> None:
        if not await self._store.ping():
            raise StoreUnavailableError("The embedding store cannot be used now.")


def _query(key: ItemKey) -> MediaQuery:
    return MediaQuery(key.modality, key.options, uuid=key.uuid, source_digest=key.source_digest)
