"""Bound what one tenant adds to the embedding store in an hour.

Redis evicts what was not used for longest, whoever it belongs to. A tenant that stores one new
embedding after another would so push out those of all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.metrics import STORE_BYPASSES
from chiasm.common.secrets import tenant_tag

if TYPE_CHECKING:
    from chiasm.common.guarded_redis import GuardedRedis

_WINDOW_MS = 3_600_000


class StoreQuotaError(StoreUnavailableError):
    """A tenant has stored as much as it may in this hour."""

    default_reason = "STORE_QUOTA"


class StoreQuota:
    """Counts the bytes of each tenant in Redis, for all encoders together.

    An hour begins with the first embedding after the one before has ended. The count is below the
    tenant's own tag; it may be evicted like every key, and then begins anew.
    """

    def __init__(self, redis: GuardedRedis, bytes_per_hour: int) -> None:
        """Use ``redis``; a tenant may store ``bytes_per_hour``, 0 for any number."""
        self._redis = redis
        self._bytes_per_hour = bytes_per_hour

    async def take(self, tenant: str, num_bytes: int) -> None:
        """Count an embedding that is about to be stored.

        Args:
            tenant: Tenant that it belongs to.
            num_bytes: Its size.

        Raises:
            StoreQuotaError: The tenant has no room for it in this hour; nothing was counted.
            StoreUnavailableError: The store cannot be used now.
        """
        if not self._bytes_per_hour:
            return
        key = f"chiasm:{tenant_tag(tenant)}:q"
        start = ("SET", key, 0, "PX", _WINDOW_MS, "NX")
        _, total = await self._redis.execute([start, ("INCRBY", key, num_bytes)])
        if isinstance(total, int) and total <= self._bytes_per_hour:
            return
        await self._redis.execute([("INCRBY", key, -num_bytes)])
        STORE_BYPASSES.labels("quota").inc()
        raise StoreQuotaError("The tenant has stored as much as it may in this hour.")
