"""Remember which source a client's uuid stands for.

An alias maps (tenant, cache salt, modality, uuid) to the digest of a source and, if the source came
by URL, the digest of the URL. The uuid itself is never a key: Redis sees a keyed hash of it. Beside
the digests stands a record of the item, for those who ask what there is; its texts are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiasm.common.alias_target import AliasTarget, pack_target, unpack_target
from chiasm.common.envelope import EnvelopeError, EnvelopeKind, seal, sealer, unseal
from chiasm.common.identity import AliasName, alias_hash
from chiasm.common.metrics import STORE_BAD_ENTRIES
from chiasm.common.secrets import tenant_tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.alias_target import AliasRecord
    from chiasm.common.guarded_redis import Command, GuardedRedis
    from chiasm.common.secrets import StoreSecrets, TenantKeys

# The longest record fits twice: 128 characters of salt and 512 of uuid, 4 bytes each at most.
MAX_ALIAS_BYTES = 8192

_MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class PeekedAlias:
    """What an alias stands for, and in how many seconds it is forgotten if it is not used."""

    target: AliasTarget
    left_s: float


class AliasStore:
    """Aliases in Redis: bound once, then only confirmed, until they expire or are deleted.

    After its last use an alias lives as long as its record says, or else twice as long as the
    embedding that it leads to.
    """

    def __init__(self, redis: GuardedRedis, secrets: StoreSecrets, embedding_ttl_s: float) -> None:
        self._redis = redis
        self._secrets = secrets
        self._embedding_ttl_s = embedding_ttl_s

    async def read(self, tenant: str, name: AliasName) -> AliasTarget | None:
        """Return what ``name`` stands for and renew its time; ``None`` if it is not bound.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        for keys in self._secrets.generations(tenant):
            target = await self._read(tenant, keys, name)
            if target is not None:
                return target
        return None

    async def peek(self, tenant: str, name: AliasName) -> PeekedAlias | None:
        """Return what ``name`` stands for, without counting it as a use; ``None`` if unbound.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        subjects = [alias_hash(keys, name) for keys in self._secrets.generations(tenant)]
        return next(iter(await self.peek_hashes(tenant, subjects)), None)

    async def peek_hashes(self, tenant: str, subjects: Sequence[bytes]) -> list[PeekedAlias]:
        """Return what the aliases with these hashes stand for, without those that are not there.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        if not subjects:
            return []
        keys = [_key(tenant_tag(tenant), subject) for subject in subjects]
        reads: list[Command] = [_get(key) for key in keys]
        replies = await self._redis.execute(reads + [("PTTL", key) for key in keys])
        peeked = []
        envelopes, lives = replies[: len(keys)], replies[len(keys) :]
        for subject, envelope, left_ms in zip(subjects, envelopes, lives, strict=True):
            if not isinstance(envelope, bytes) or not envelope or not isinstance(left_ms, int):
                continue
            try:
                target = self._unseal(tenant, subject, envelope)
            except EnvelopeError as error:
                STORE_BAD_ENTRIES.labels(f"alias_{error}").inc()
            else:
                peeked.append(PeekedAlias(target, max(0, left_ms) / 1000))
        return peeked

    async def bind(self, tenant: str, name: AliasName, target: AliasTarget) -> AliasTarget:
        """Bind ``name`` to ``target`` unless it is bound; return what it is bound to now.

        Of several binders at once one wins and all are told the same source. If the same source is
        bound already, the newest URL it came by is kept, and its record stays unless another
        encoder made the embedding that it tells of.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        keys = self._secrets.keys(tenant)
        for _ in range(_MAX_ATTEMPTS):
            bound = await self.read(tenant, name)
            if bound is not None and bound.source_digest != target.source_digest:
                return bound
            if bound is None:
                if await self._create(keys, name, target):
                    return target
                continue
            renewed = _renew(bound, target)
            if renewed == bound or await self._replace(tenant, name, bound, renewed):
                return renewed
        return await self.read(tenant, name) or target

    async def describe(
        self, tenant: str, name: AliasName, record: AliasRecord
    ) -> AliasTarget | None:
        """Give ``name`` a new record; return its target, ``None`` if it is not bound.

        Args:
            tenant: Tenant it belongs to.
            name: The alias.
            record: When it was named stays as it was, and its bytes unless they are given.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        for _ in range(_MAX_ATTEMPTS):
            bound = await self.read(tenant, name)
            if bound is None:
                return None
            target = replace(bound, record=_merge(bound.record, record))
            if target == bound or await self._replace(tenant, name, bound, target):
                return target
        return None

    async def delete(self, tenant: str, name: AliasName) -> bool:
        """Forget ``name``; tell whether it was bound.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        subjects = [alias_hash(keys, name) for keys in self._secrets.generations(tenant)]
        keys = [_key(tenant_tag(tenant), subject) for subject in subjects]
        return any(await self._redis.execute([("UNLINK", key) for key in keys]))

    async def _read(self, tenant: str, keys: TenantKeys, name: AliasName) -> AliasTarget | None:
        subject = alias_hash(keys, name)
        key = _key(keys.tag, subject)
        envelope, _ = await self._redis.execute([_get(key), ("PEXPIRE", key, self._ttl_ms(0))])
        if not isinstance(envelope, bytes) or not envelope:
            return None
        try:
            target = self._unseal(tenant, subject, envelope)
        except EnvelopeError as error:
            STORE_BAD_ENTRIES.labels(f"alias_{error}").inc()
            await self._redis.execute_if(key, envelope, ("UNLINK", key))
            return None
        if target.ttl_s:
            await self._redis.execute([("PEXPIRE", key, self._ttl_ms(target.ttl_s))])
        return target

    async def _create(self, keys: TenantKeys, name: AliasName, target: AliasTarget) -> bool:
        key, new = _key(keys.tag, alias_hash(keys, name)), self._seal(keys, name, target)
        ttl_ms = self._ttl_ms(target.ttl_s)
        (reply,) = await self._redis.execute([("SET", key, new, "NX", "PX", ttl_ms)])
        return bool(reply)

    async def _replace(
        self, tenant: str, name: AliasName, bound: AliasTarget, target: AliasTarget
    ) -> bool:
        """Write ``target`` where ``bound`` stands, under whichever secret; tell if it stood."""
        for keys in self._secrets.generations(tenant):
            key = _key(keys.tag, alias_hash(keys, name))
            old, new = self._seal(keys, name, bound), self._seal(keys, name, target)
            command = ("SET", key, new, "PX", self._ttl_ms(target.ttl_s))
            if await self._redis.execute_if(key, old, command):
                return True
        return False

    def _ttl_ms(self, ttl_s: int) -> int:
        return int((ttl_s or 2 * self._embedding_ttl_s) * 1000)

    def _unseal(self, tenant: str, subject: bytes, envelope: bytes) -> AliasTarget:
        body = unseal(self._secrets, tenant, EnvelopeKind.ALIAS, subject, envelope)
        return unpack_target(sealer(self._secrets, tenant, envelope), subject, body)

    @staticmethod
    def _seal(keys: TenantKeys, name: AliasName, target: AliasTarget) -> bytes:
        subject = alias_hash(keys, name)
        return seal(keys, EnvelopeKind.ALIAS, subject, pack_target(keys, subject, target))


def alias_prefix(tag: str) -> str:
    """Return what the Redis keys of all aliases of the tenant with ``tag`` begin with."""
    return f"chiasm:{tag}:a:"


def _renew(bound: AliasTarget, target: AliasTarget) -> AliasTarget:
    """Return ``bound`` with what another bind to the same source tells anew."""
    record, newer = bound.record, target.record
    if newer is not None and (record is None or record.fingerprint != newer.fingerprint):
        # The embedding of the record's fingerprint cannot be used by who binds now.
        record = replace(_merge(record, newer), ttl_s=bound.ttl_s)
    return AliasTarget(bound.source_digest, target.url_digest or bound.url_digest, record)


def _merge(old: AliasRecord | None, new: AliasRecord) -> AliasRecord:
    if old is None:
        return new
    return replace(new, created_s=old.created_s, num_bytes=new.num_bytes or old.num_bytes)


def _key(tag: str, subject: bytes) -> str:
    return alias_prefix(tag) + subject.hex()


def _get(key: str) -> Command:
    # GETRANGE bounds what a foreign value under our key can make us read.
    return ("GETRANGE", key, 0, MAX_ALIAS_BYTES)
