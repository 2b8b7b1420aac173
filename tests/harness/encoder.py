"""Run the encoder as a process of its own and call it as the gateway does."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import numpy as np

from chiasm.common.grpc_channel import open_channel
from chiasm.common.grpc_client import error_from_rpc
from chiasm.common.service_token import load_or_create_service_token
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc, media_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from chiasm.v1.encoder_pb2_grpc import EncoderServiceAsyncStub

_START_TIMEOUT_S = 50.0
_CALL_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class Answer:
    """What one ``Encode`` call gave: messages in the order of ``kinds``.

    ``planned_at`` is when the plan came, by ``time.perf_counter``.
    """

    kinds: list[str] = field(default_factory=list)
    planned: media_pb2.EmbeddingRef | None = None
    layout: media_pb2.MediaLayout | None = None
    planned_status: int = 0
    planned_at: float = 0.0
    ready: encoder_pb2.Ready = field(default_factory=encoder_pb2.Ready)
    data: bytearray = field(default_factory=bytearray)

    @property
    def status(self) -> int:
        """Cache status of the final message."""
        return self.ready.cache_status

    @property
    def ref(self) -> media_pb2.EmbeddingRef:
        """The planned ref."""
        assert self.planned is not None, "no planned message came"
        return self.planned

    def rows(self) -> np.ndarray:
        """Return the embedding that came inline. [num_tokens, hidden_size], float32."""
        return np.frombuffer(self.data, np.float32).reshape(tuple(self.ref.tensors[0].shape))

    def take(self, response: encoder_pb2.EncodeResponse) -> None:
        """Add one message."""
        kind = response.WhichOneof("message") or ""
        self.kinds.append(kind)
        if kind == "planned":
            self.planned_at = time.perf_counter()
            self.planned = response.planned.ref
            self.layout = response.planned.layout
            self.planned_status = response.planned.cache_status
        elif kind == "chunk":
            assert response.chunk.offset == len(self.data)
            self.data += response.chunk.data
        else:
            self.ready = response.ready


class EncoderClient:
    """Calls one encoder; raises the errors that it answers with."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = open_channel(address, token)
        self.stub: EncoderServiceAsyncStub = encoder_pb2_grpc.EncoderServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def encode(
        self,
        data: bytes | None = None,
        *,
        tenant: str = "tenant",
        inline: bool = False,
        **header: object,
    ) -> Answer:
        """Encode one item; ``header`` holds further fields of ``EncodeHeader``."""
        message = make_header(tenant, data, header)
        if inline:
            message.delivery = encoder_pb2.DELIVERY_INLINE
        call = self.stub.Encode(_requests(message, data), timeout=_CALL_TIMEOUT_S)
        answer = Answer()
        try:
            async for response in call:
                answer.take(response)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        return answer

    async def plan(self, data: bytes) -> encoder_pb2.PlanResponse:
        """Plan one item."""
        header = make_header("tenant", data, {})

        async def requests() -> AsyncIterator[encoder_pb2.PlanRequest]:
            yield encoder_pb2.PlanRequest(header=header)
            yield encoder_pb2.PlanRequest(chunk=data)

        try:
            return await self.stub.Plan(requests(), timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None

    async def info(self) -> encoder_pb2.GetEncoderInfoResponse:
        """Return the encoder's description."""
        request = encoder_pb2.GetEncoderInfoRequest()
        return await self.stub.GetEncoderInfo(request, timeout=_CALL_TIMEOUT_S)


def make_header(
    tenant: str, data: bytes | None, fields: dict[str, object]
) -> encoder_pb2.EncodeHeader:
    """Return the header of a call for ``data``."""
    header = encoder_pb2.EncodeHeader(
        context=make_context(tenant),
        modality=media_pb2.MODALITY_IMAGE,
        bytes=None if data is None else encoder_pb2.BytesSource(num_bytes=len(data)),
    )
    header.MergeFrom(encoder_pb2.EncodeHeader(**fields))  # type: ignore[arg-type]  # checked by upb
    return header


def make_context(tenant: str) -> media_pb2.RequestContext:
    """Return the context of a call by ``tenant``."""
    return media_pb2.RequestContext(request_id="request", attempt_id="attempt", tenant=tenant)


async def _requests(
    header: encoder_pb2.EncodeHeader, data: bytes | None
) -> AsyncIterator[encoder_pb2.EncodeRequest]:
    yield encoder_pb2.EncodeRequest(header=header)
    for offset in range(0, len(data or b""), _CHUNK_BYTES):
        yield encoder_pb2.EncodeRequest(chunk=(data or b"")[offset : offset + _CHUNK_BYTES])


class EncoderProcess:
    """``python -m chiasm.encoder``, or a program around it, with the secrets of ``state_dir``."""

    def __init__(
        self,
        model: Path,
        redis_url: str,
        state_dir: Path,
        flags: Sequence[str],
        program: Sequence[str] = ("chiasm.encoder",),
    ) -> None:
        self._token = load_or_create_service_token(state_dir / "service_token")
        self._command = [
            *(sys.executable, "-m", *program, "--model", str(model)),
            *("--redis-url", redis_url, "--dtype", "float32", "--device", "cpu", "--cores", "1"),
            *("--service-token-file", str(state_dir / "service_token")),
            *("--store-secret-file", str(state_dir / "store_secret")),
            *("--store-timeout-s", "2", *flags),
        ]
        self._process: asyncio.subprocess.Process | None = None
        self._log: asyncio.Task[None] | None = None
        self.lines: list[str] = []
        self.port = 0

    @property
    def token(self) -> str:
        """The stack's service token."""
        return self._token

    @property
    def address(self) -> str:
        """Address of the gRPC port."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    async def start(self) -> None:
        """Start the process and return when it serves."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        serving: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._log = asyncio.create_task(self._read_log(serving))
        self.port = await asyncio.wait_for(serving, _START_TIMEOUT_S)

    def client(self) -> EncoderClient:
        """Return a new client of the process."""
        return EncoderClient(self.address, self._token)

    async def stop(self) -> int:
        """Send SIGTERM, unless the process has ended its log, and return the exit status."""
        assert self._process is not None, "start() comes first"
        assert self._log is not None, "start() comes first"
        if not self._log.done():
            # NOTE: a signal to a process that ends anyway would take its status from the loop.
            self._process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(self._process.wait(), _START_TIMEOUT_S)
        await self._log
        return status

    async def _read_log(self, serving: asyncio.Future[int]) -> None:
        assert self._process is not None, "start() comes first"
        assert self._process.stderr is not None, "stderr is a pipe"
        async for line in self._process.stderr:
            text = line.decode().rstrip()
            self.lines.append(text)
            if '"event": "serving"' in text and not serving.done():
                serving.set_result(json.loads(text)["port"])
        if not serving.done():
            serving.set_exception(RuntimeError("\n".join(self.lines)))
