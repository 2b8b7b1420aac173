"""Lead a flight for ever: a process to be killed by a test.

Usage: ``python -m tests.fakes.lease_holder REDIS_URL SECRET_FILE EMBEDDING_ID_HEX``; prints a line
when it encodes.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from chiasm.common.embedding_store import EmbeddingStore
from chiasm.common.secrets import StoreSecrets
from chiasm.common.single_flight import SingleFlight


async def hold(redis_url: str, secret_file: str, embedding_id: str) -> None:
    """Lead the flight of ``embedding_id`` and never finish."""
    store = EmbeddingStore.connect(redis_url, StoreSecrets.load(Path(secret_file)))
    flights: SingleFlight[None] = SingleFlight(store)

    async def encode() -> None:
        sys.stdout.write("encoding\n")
        sys.stdout.flush()
        await asyncio.Event().wait()

    await flights.run("a", bytes.fromhex(embedding_id), encode)


if __name__ == "__main__":
    asyncio.run(hold(*sys.argv[1:]))
