"""Walk over what Redis holds of one tenant: list its aliases a page at a time, or forget it all.

Redis has no index by tenant: a walk looks at every key of the database. It goes in small steps,
between which others are served; a page is a bounded number of steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.alias_store import alias_prefix
from chiasm.common.errors import InvalidRequestError
from chiasm.common.media import DIGEST_BYTES
from chiasm.common.secrets import tenant_tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.guarded_redis import GuardedRedis

_KEYS_PER_STEP = 1000
_STEPS_PER_PAGE = 50
_MAX_POSITION = 1 << 64
_HASH = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
_CURSOR = re.compile(rf"(\d{{1,20}})(?:\.([0-9a-f]{{{2 * DIGEST_BYTES}}}))?")


@dataclass(frozen=True, slots=True)
class ScanCursor:
    """Where a walk goes on: at which step, and behind which hash of that step in their order."""

    position: int = 0
    last_hash: str = ""

    @classmethod
    def parse(cls, text: str, param: str) -> ScanCursor:
        """Return the cursor that ``str`` wrote; an empty text is the beginning.

        Raises:
            InvalidRequestError: It is no cursor of ours; names ``param``.
        """
        if not text:
            return cls()
        found = _CURSOR.fullmatch(text)
        if found is None or int(found[1]) >= _MAX_POSITION:
            raise InvalidRequestError(
                f"{param} must be the last_id of the page before.", param=param
            )
        return cls(int(found[1]), found[2] or "")

    def __str__(self) -> str:
        return f"{self.position}.{self.last_hash}" if self.last_hash else str(self.position)


@dataclass(frozen=True, slots=True)
class HashPage:
    """Hashes of aliases, each once, and where the next page begins; ``None`` after the last."""

    hashes: tuple[bytes, ...]
    next_cursor: ScanCursor | None


class TenantScan:
    """Walks over the keys of a tenant."""

    def __init__(self, redis: GuardedRedis) -> None:
        self._redis = redis

    async def alias_hashes(self, tenant: str, start: ScanCursor, max_hashes: int) -> HashPage:
        """Return the hashes of up to ``max_hashes`` aliases of ``tenant``, in no useful order.

        A page may hold few or none although more follow. Aliases that are there from the first page
        to the last come at least once; one may come on two pages if Redis grows meanwhile.

        Raises:
            StoreUnavailableError: The store cannot be used now.
        """
        prefix = alias_prefix(tenant_tag(tenant))
        found: dict[str, None] = {}
        cursor = start
        for _ in range(_STEPS_PER_PAGE):
            position, keys = await self._redis.scan(cursor.position, f"{prefix}*", _KEYS_PER_STEP)
            hashes = [text for text in _hashes(keys, prefix) if text > cursor.last_hash]
            room = max_hashes - len(found)
            found.update(dict.fromkeys(hashes[:room]))
            if len(hashes) > room:
                return _page(found, ScanCursor(cursor.position, hashes[room - 1]))
            if position == 0:
                return _page(found, None)
            cursor = ScanCursor(position)
            if len(found) >= max_hashes:
                break
        return _page(found, cursor)

    async def forget(self, tenant: str) -> int:
        """Delete every alias and embedding of ``tenant``; return how many aliases there were.

        Ends when the whole database has been walked over; cancel it to stop earlier. What is being
        encoded meanwhile may be stored behind the walk.

        Raises:
            StoreUnavailableError: The store cannot be used now; a part may be gone.
        """
        tag = tenant_tag(tenant)
        prefix = alias_prefix(tag).encode()
        num_aliases, position = 0, 0
        while True:
            position, keys = await self._redis.scan(position, f"chiasm:{tag}:*", _KEYS_PER_STEP)
            # Leases stay: they name work that goes on, and end by themselves.
            doomed = [key for key in keys if not key.endswith(b":l")]
            if doomed:
                replies = await self._redis.execute([("UNLINK", key) for key in doomed])
                num_aliases += sum(
                    key.startswith(prefix) and bool(reply)
                    for key, reply in zip(doomed, replies, strict=True)
                )
            if position == 0:
                return num_aliases


def _hashes(keys: Sequence[bytes], prefix: str) -> list[str]:
    texts = (key.decode("ascii", "replace").removeprefix(prefix) for key in keys)
    return sorted(text for text in texts if _HASH.fullmatch(text))


def _page(found: dict[str, None], next_cursor: ScanCursor | None) -> HashPage:
    return HashPage(tuple(map(bytes.fromhex, found)), next_cursor)
