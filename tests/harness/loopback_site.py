"""Servers on loopback: media that misbehave, and a canary that counts who reaches it."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import TYPE_CHECKING, Self

from tests.fakes.media_server import MediaServer, broken, endless, respond, silent

if TYPE_CHECKING:
    from collections.abc import Mapping

ALLOWED = "127.0.0.2"
FORBIDDEN = ("127.0.0.1", "::1")
NAMES: Mapping[str, list[list[str]]] = {
    "public.test": [[ALLOWED]],
    "private.test": [["127.0.0.1"]],
    "private-v6.test": [["::1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "mixed.test": [[ALLOWED, "127.0.0.1"]],
    "mixed-v6.test": [[ALLOWED, "::1"]],
    "rebinding.test": [[ALLOWED], ["127.0.0.1"]],
}
_START_TIMEOUT_S = 10.0
_MAX_PORTS = 20


class LoopbackSite:
    """All servers, on one port, in a thread of their own while the context is open."""

    def __init__(self, picture: bytes) -> None:
        self._picture = picture
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._allowed = MediaServer()
        self._canaries: list[MediaServer] = []
        self.port = 0

    @property
    def num_forbidden(self) -> int:
        """Connections that reached an address that may not be dialled."""
        return sum(canary.num_connections for canary in self._canaries)

    @property
    def num_allowed(self) -> int:
        """Connections that reached the address that may be dialled."""
        return self._allowed.num_connections

    def __enter__(self) -> Self:
        """Start to listen."""
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop the servers and the thread."""
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        for _ in range(_MAX_PORTS):
            await self._allowed.start(ALLOWED)
            self.port = self._allowed.port
            if await self._start_canaries():
                break
            await self._allowed.stop()  # somebody else has this port on another address
        else:
            raise OSError("no port is free on all addresses")
        self._add_media()

    async def _start_canaries(self) -> bool:
        """Listen on the forbidden addresses that the host has; return whether the port is free."""
        for address in FORBIDDEN:
            canary = MediaServer({"/picture.png": respond("200 OK", self._picture)})
            try:
                await canary.start(address, self.port)
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue
                return False
            self._canaries.append(canary)
        return True

    def _add_media(self) -> None:
        add = self._allowed.add
        targets = {
            "address": f"http://127.0.0.1:{self.port}/picture.png",
            "name": f"http://private.test:{self.port}/picture.png",
            "v6": f"http://[::1]:{self.port}/picture.png",
            "scheme-relative": f"//127.0.0.1:{self.port}/picture.png",
            "userinfo": f"http://public.test:{self.port}@127.0.0.1:{self.port}/picture.png",
            "backslash": f"http://127.0.0.1:{self.port}\\@public.test/",
            "file": "file:///etc/passwd",
            "data": "data:text/plain;base64,AAAA",
            "loop": "/to-loop",
        }
        for name, target in targets.items():
            add(f"/to-{name}", respond("302 Found", Location=target))
        add("/picture.png", respond("200 OK", self._picture))
        add("/page.html", respond("200 OK", b"<html>" * 99, Content_Type="image/png"))
        add("/gzip", respond("200 OK", b"bomb", Content_Encoding="gzip"))
        add("/huge", respond("200 OK", b"x", Content_Length=str(1 << 40)))
        add("/negative", respond("200 OK", b"x", Content_Length="-1"))
        add("/empty", respond("200 OK"))
        add("/endless", endless)
        add("/silent", silent)
        add("/broken", broken)
        add("/trickle", _trickle)

    async def _stop(self) -> None:
        for server in (self._allowed, *self._canaries):
            await server.stop()

    def _run(self, coroutine: object) -> None:
        assert asyncio.iscoroutine(coroutine)
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_START_TIMEOUT_S)


async def _trickle(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.2)
