"""A relay that ends TLS in front of a server on a UNIX socket, for servers built without TLS."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from pathlib import Path

_PIECE_BYTES = 1 << 16


@asynccontextmanager
async def tls_relay(path: Path, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Yield the port of ``localhost`` on which the server at ``path`` is reached by TLS."""
    tasks: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = None
        try:
            from_server, to_server = await asyncio.open_unix_connection(path)
            back = asyncio.create_task(_pump(from_server, writer))
            tasks.add(back)
            await _pump(reader, to_server)
            await back
        finally:
            writer.close()
            if to_server is not None:
                to_server.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(relay(reader, writer)))

    server = await asyncio.start_server(accept, "localhost", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        return  # one side has left; the other learns it below
    finally:
        writer.close()
