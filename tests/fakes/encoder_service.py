"""An encoder that encodes nothing: a real gRPC server with a fixed layout per item."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING

from blake3 import blake3

from chiasm.common.convert import (
    layout_to_proto,
    modality_from_proto,
    modality_to_proto,
    ref_to_proto,
)
from chiasm.common.errors import ChiasmError, InvalidRequestError
from chiasm.common.grpc_server import GrpcServer
from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    Modality,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc, media_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import grpc

NUM_IMAGE_TOKENS = 5
HIDDEN_SIZE = 4
TIMINGS = encoder_pb2.StageTimings(
    fetch_s=0.25, decode_s=0.5, preprocess_s=1.0, encode_s=2.0, store_s=4.0
)


class FakeEncoder(encoder_pb2_grpc.EncoderServiceServicer):
    """Plans every item as ``NUM_IMAGE_TOKENS`` placeholder tokens.

    Attributes:
        video_placeholder_id: Token of a video; ``None``: videos are not taken.
        headers: Header of every call, in order.
        sources: Bytes of every call, in order.
        errors: Error to raise before the plan, by the item's bytes or URL.
        id_of: Embedding ids of sources that must not have the usual one.
        late_errors: Error to raise after the plan.
        last_errors: Error to raise after the chunk of an embedding that travels inline.
        is_inline: Whether embeddings travel inline although STORE was asked for.
        ready: Gate between plan and embedding; open at first.
        planned: Gate before the plan; open at first.
        started: Set when a source has been read.
        cancelled: Set when a caller cancels.
        refusals: Raised at once by the next calls, one each.
        keep: Called before the plan, to store the embedding; ``None``: nothing is stored.
    """

    def __init__(self, placeholder_id: int, fingerprint: bytes = b"f" * 32) -> None:
        self._placeholder_id = placeholder_id
        self.fingerprint = fingerprint
        self.video_placeholder_id: int | None = None
        self.forget()

    def forget(self) -> None:
        """Start afresh."""
        self.headers: list[encoder_pb2.EncodeHeader] = []
        self.sources: list[bytes] = []
        self.errors: dict[bytes, ChiasmError] = {}
        self.late_errors: dict[bytes, ChiasmError] = {}
        self.last_errors: dict[bytes, ChiasmError] = {}
        self.id_of: dict[bytes, bytes] = {}
        self.is_inline = False
        self.ready = asyncio.Event()
        self.ready.set()
        self.planned = asyncio.Event()
        self.planned.set()
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.refusals: list[ChiasmError] = []
        self.keep: Callable[[encoder_pb2.EncodeHeader, bytes], Awaitable[None]] | None = None

    def ref(self, source: bytes, modality: Modality = Modality.IMAGE) -> EmbeddingRef:
        """Return the ref of the item with these bytes or this URL."""
        spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (NUM_IMAGE_TOKENS, HIDDEN_SIZE))
        embedding_id = self.id_of.get(source) or blake3(source).digest()
        return EmbeddingRef(embedding_id, self.fingerprint, modality, (spec,))

    def layout(self, modality: Modality = Modality.IMAGE) -> MediaLayout:
        """Return the layout of every item of a modality."""
        token_id = self._placeholder_ids()[modality]
        return MediaLayout((TokenRun(token_id, NUM_IMAGE_TOKENS, is_embedding=True),))

    def _placeholder_ids(self) -> dict[Modality, int]:
        ids = {Modality.IMAGE: self._placeholder_id}
        if self.video_placeholder_id is not None:
            ids[Modality.VIDEO] = self.video_placeholder_id
        return ids

    async def Encode(  # noqa: N802 - named by the proto
        self,
        request_iterator: AsyncIterator[encoder_pb2.EncodeRequest],
        context: grpc.aio.ServicerContext[encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse],
    ) -> AsyncIterator[encoder_pb2.EncodeResponse]:
        """Read the source, plan, wait for the gate, be ready."""
        if self.refusals:
            raise self.refusals.pop()
        has_ended = False
        try:
            header = (await anext(request_iterator)).header
            data = b"".join([request.chunk async for request in request_iterator])
            source = data or header.url.encode() or header.uuid.encode()
            self.headers.append(header)
            self.sources.append(data)
            self.started.set()
            # NOTE: a copy, since an error that was raised keeps this server alive by its frames.
            if source in self.errors:
                raise copy.copy(self.errors[source])
            if self.keep is not None:
                await self.keep(header, source)
            await self.planned.wait()
            modality = modality_from_proto(header.modality)
            ref = self.ref(source, modality)
            planned = encoder_pb2.Planned(
                ref=ref_to_proto(ref),
                layout=layout_to_proto(self.layout(modality)),
                cache_status=media_pb2.CACHE_STATUS_MISS,
            )
            yield encoder_pb2.EncodeResponse(planned=planned)
            await self.ready.wait()
            if source in self.late_errors:
                raise copy.copy(self.late_errors[source])
            status = media_pb2.CACHE_STATUS_MISS
            if self.is_inline or header.delivery == encoder_pb2.DELIVERY_INLINE:
                status = media_pb2.CACHE_STATUS_INLINE
                chunk = media_pb2.EmbeddingChunk(
                    embedding_id=ref.embedding_id, data=bytes(ref.num_bytes), is_last=True
                )
                yield encoder_pb2.EncodeResponse(chunk=chunk)
                if source in self.last_errors:
                    raise copy.copy(self.last_errors[source])
            ready = encoder_pb2.Ready(cache_status=status, timings=TIMINGS)
            yield encoder_pb2.EncodeResponse(ready=ready)
            has_ended = True
        except ChiasmError:
            has_ended = True
            raise
        finally:
            if not has_ended:
                self.cancelled.set()

    async def GetEncoderInfo(  # noqa: N802 - named by the proto
        self,
        request: encoder_pb2.GetEncoderInfoRequest,
        context: grpc.aio.ServicerContext[
            encoder_pb2.GetEncoderInfoRequest, encoder_pb2.GetEncoderInfoResponse
        ],
    ) -> encoder_pb2.GetEncoderInfoResponse:
        """Describe the encoder."""
        placeholders = [
            encoder_pb2.Placeholder(modality=modality_to_proto(modality), token_id=token_id)
            for modality, token_id in self._placeholder_ids().items()
        ]
        return encoder_pb2.GetEncoderInfoResponse(
            model="fake",
            fingerprint=self.fingerprint,
            modalities=[placeholder.modality for placeholder in placeholders],
            placeholders=placeholders,
        )

    async def Plan(  # noqa: N802 - named by the proto
        self,
        request_iterator: AsyncIterator[encoder_pb2.PlanRequest],
        context: grpc.aio.ServicerContext[encoder_pb2.PlanRequest, encoder_pb2.PlanResponse],
    ) -> encoder_pb2.PlanResponse:
        """Read the source and plan it."""
        header = (await anext(request_iterator)).header
        data = b"".join([request.chunk async for request in request_iterator])
        source = data or header.url.encode()
        self.headers.append(header)
        if source in self.errors:
            raise copy.copy(self.errors[source])
        return encoder_pb2.PlanResponse(
            layout=layout_to_proto(self.layout()),
            num_tokens=NUM_IMAGE_TOKENS,
            num_pixels=len(source),
            num_queue_pixels=2 * len(source),
        )

    async def Lookup(  # noqa: N802 - named by the proto
        self,
        request: encoder_pb2.LookupRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.LookupRequest, encoder_pb2.LookupResponse],
    ) -> encoder_pb2.LookupResponse:
        """Refuse: the gateway looks items up in the store itself."""
        raise InvalidRequestError("The fake encoder only encodes.")

    async def Delete(  # noqa: N802 - named by the proto
        self,
        request: encoder_pb2.DeleteRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.DeleteRequest, encoder_pb2.DeleteResponse],
    ) -> encoder_pb2.DeleteResponse:
        """Refuse: there is nothing to delete."""
        raise InvalidRequestError("The fake encoder only encodes.")


async def start_encoder(
    encoder: FakeEncoder, token: str, address: str = "127.0.0.1:0"
) -> tuple[GrpcServer, int]:
    """Serve ``encoder``; return its server and port."""
    server = GrpcServer(address=address, service_names=["chiasm.v1.EncoderService"], token=token)
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(encoder, server.server)
    port = await server.start()
    await server.set_serving(True)
    return server, port
