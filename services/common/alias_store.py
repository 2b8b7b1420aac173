"""Remember which source a client's uuid stands for.

An alias maps (tenant, cache salt, modality, uuid) to the digest of a source and, if the source came
by URL, the digest of the URL. The uuid itself is never a key: Redis sees a keyed hash of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.envelope import (
    MAX_ENVELOPE_BYTES,
    EnvelopeError,
    EnvelopeKind,
    seal,
    unseal,
)
from chiasm.common.identity import AliasName, alias_hash
from chiasm.common.media import DIGEST_BYTES
from chiasm.common.metrics import STORE_BAD_ENTRIES

if TYPE_CHECKING:
    from chiasm.common.guarded_redis import GuardedRedis
    from chiasm.common.secrets import StoreSecrets, TenantKeys

_MAX_BIND_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """What a uuid stands for; ``url_digest`` is empty if the source did not come by URL."""

    source_digest: bytes
    url_digest: bytes = b""


class AliasStore:
    """Aliases in Redis: bound once, then only confirmed, until they expire or are deleted."""

    def __init__(self, redis: GuardedRedis, secrets: StoreSecrets, ttl_s: float) -> None:
        self._redis = redis
        self._secrets = secrets
        self._ttl_ms = int(ttl_s * 1000)

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

    async def bind(self, tenant: str, name: AliasName, target: AliasTarget) -> AliasTarget:
        """Bind ``name`` to ``target`` unless it is bound; return what it is bound to now.

        Of several binders at once one wins and all are told the same source. If the same source is
        bound already, the newest URL it came by is kept.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        keys = self._secrets.keys(tenant)
        for _ in range(_MAX_BIND_ATTEMPTS):
            bound = await self.read(tenant, name)
            if bound is not None and bound.source_digest != target.source_digest:
                return bound
            if await self._write(keys, name, bound, target):
                return target
        return await self.read(tenant, name) or target

    async def delete(self, tenant: str, name: AliasName) -> bool:
        """Forget ``name``; tell whether it was bound.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        keys = [_alias_key(keys, name) for keys in self._secrets.generations(tenant)]
        return any(await self._redis.execute([("UNLINK", key) for key in keys]))

    async def _read(self, tenant: str, keys: TenantKeys, name: AliasName) -> AliasTarget | None:
        key = _alias_key(keys, name)
        envelope, _ = await self._redis.execute(
            [("GETRANGE", key, 0, MAX_ENVELOPE_BYTES), ("PEXPIRE", key, self._ttl_ms)]
        )
        if not isinstance(envelope, bytes) or not envelope:
            return None
        try:
            subject = alias_hash(keys, name)
            body = unseal(self._secrets, tenant, EnvelopeKind.ALIAS, subject, envelope)
            return _parse(body)
        except EnvelopeError as error:
            STORE_BAD_ENTRIES.labels(f"alias_{error}").inc()
            await self._redis.execute_if(key, envelope, ("UNLINK", key))
            return None

    async def _write(
        self, keys: TenantKeys, name: AliasName, bound: AliasTarget | None, target: AliasTarget
    ) -> bool:
        if bound is not None and target.url_digest in (b"", bound.url_digest):
            return True
        key = _alias_key(keys, name)
        new = self._seal(keys, name, target)
        if bound is None:
            (reply,) = await self._redis.execute([("SET", key, new, "NX", "PX", self._ttl_ms)])
            return bool(reply)
        old = self._seal(keys, name, bound)
        return await self._redis.execute_if(key, old, ("SET", key, new, "PX", self._ttl_ms))

    @staticmethod
    def _seal(keys: TenantKeys, name: AliasName, target: AliasTarget) -> bytes:
        body = target.source_digest + target.url_digest
        return seal(keys, EnvelopeKind.ALIAS, alias_hash(keys, name), body)


def _alias_key(keys: TenantKeys, name: AliasName) -> str:
    return f"chiasm:{keys.tag}:a:{alias_hash(keys, name).hex()}"


def _parse(body: bytes) -> AliasTarget:
    if len(body) not in (DIGEST_BYTES, 2 * DIGEST_BYTES):
        raise EnvelopeError("length")
    return AliasTarget(body[:DIGEST_BYTES], body[DIGEST_BYTES:])
