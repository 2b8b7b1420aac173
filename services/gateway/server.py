"""Run the gateway: REST and gRPC in one loop, from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from typing import TYPE_CHECKING, Protocol

import structlog
import uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.applications import Starlette

    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.grpc_server import GrpcServer

    from .drain import Drain
    from .stack_info import StackInfo

_ERROR_MARGIN_S = 2
_READY_CHECK_S = 0.1

log = structlog.get_logger(__name__)


class Peers(Protocol):
    """Connections to services of one kind."""

    async def start(self) -> None:
        """Find the services."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class GatewayServer:
    """The listening side of the gateway and what runs beside it.

    Attributes:
        http_port: Bound port of the REST API; 0 before ``start``.
        grpc_port: Bound port of ``ChatService``; 0 before ``start``.
    """

    def __init__(
        self,
        app: Starlette,
        grpc_server: GrpcServer,
        peers: tuple[Peers, ...],
        stack: StackInfo,
        store: EmbeddingStore | None,
        drain: Drain,
    ) -> None:
        """Take the parts; nothing listens before ``start``.

        Args:
            app: The REST API.
            grpc_server: The server of ``ChatService``.
            peers: Connections to encoders and generators.
            stack: What is known of the peers.
            store: The embedding store, to be closed at the end; ``None`` without one.
            drain: Bound on how long running answers go on when the process is stopped.
        """
        self._grpc_server = grpc_server
        self._peers = peers
        self._stack = stack
        self._store = store
        self._drain = drain
        self._tasks: list[asyncio.Task[None]] = []
        self._is_ready = asyncio.Event()
        self._is_stopping = asyncio.Event()
        self.http_port = 0
        self.grpc_port = 0
        self._http = _HttpServer(
            uvicorn.Config(
                app,
                loop="uvloop",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                # Answers that outlast the drain have this long to send their error.
                timeout_graceful_shutdown=math.ceil(drain.max_s) + _ERROR_MARGIN_S,
            )
        )

    async def run(self, address: str) -> None:
        """Serve until SIGTERM or SIGINT, then drain.

        Raises:
            OSError: The address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._is_stopping.set)
        try:
            await self.start(address)
            await self.wait_stopping()
        finally:
            await self.stop()

    async def start(self, address: str) -> None:
        """Listen; requests are answered as soon as the peers serve.

        Args:
            address: ``host:port`` of the REST API; port 0 lets the system choose.

        Raises:
            OSError: The address cannot be listened on.
        """
        listener = _listen(address)
        host, self.http_port = listener.getsockname()[:2]
        for peers in self._peers:
            await peers.start()
        await self._stack.start()
        self.grpc_port = await self._grpc_server.start()
        self._tasks = [
            asyncio.create_task(self._http.serve([listener]), name="http"),
            asyncio.create_task(self._follow_readiness(), name="readiness"),
        ]
        await self._http.is_up.wait()
        log.info("gateway_listening", host=host, port=self.http_port, grpc_port=self.grpc_port)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the first answer can be given; raise ``TimeoutError`` after ``timeout_s``."""
        await asyncio.wait_for(self._is_ready.wait(), timeout_s)

    async def wait_stopping(self) -> None:
        """Return when a signal came; raise if the HTTP server failed."""
        stopping = asyncio.create_task(self._is_stopping.wait(), name="signals")
        http = self._tasks[0]
        await asyncio.wait({stopping, http}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if http.done():
            http.result()

    async def stop(self) -> None:
        """Refuse new requests, let running ones end, close everything; harmless if repeated.

        Both APIs drain at once. Answers that still run after that get an error and a moment to
        send it.
        """
        http, others = self._tasks[:1], self._tasks[1:]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        expiry = asyncio.get_running_loop().call_later(self._drain.max_s, self._drain.expire)
        self._http.stop()
        grpc_stop = self._grpc_server.stop(self._drain.max_s + _ERROR_MARGIN_S)
        await asyncio.gather(grpc_stop, *http, return_exceptions=True)
        expiry.cancel()
        await self._stack.close()
        for peers in self._peers:
            await peers.close()
        if self._store is not None:
            await self._store.close()
        log.info("gateway_stopped")

    async def _follow_readiness(self) -> None:
        while True:
            missing = self._stack.missing()
            if bool(missing) == self._is_ready.is_set():
                await self._grpc_server.set_serving(not missing)
                log.info("readiness_changed", is_ready=not missing, missing=missing)
                if missing:
                    self._is_ready.clear()
                else:
                    self._is_ready.set()
            await asyncio.sleep(_READY_CHECK_S)


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers, which end the process before gRPC has drained."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        self.should_exit = True


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=2048)
