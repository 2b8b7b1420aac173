"""Wire and run the encoder service."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog
import torch
import uvloop

from chiasm.common.compute_threads import ComputeThreads
from chiasm.common.config import load_settings_or_exit
from chiasm.common.cores import CorePageError, open_cores
from chiasm.common.device import DeviceUnavailableError
from chiasm.common.embedding_store import EmbeddingStore
from chiasm.common.families import UnsupportedModelError
from chiasm.common.grpc_server import AddressInUseError, GrpcServer
from chiasm.common.guarded_redis import CallBudget
from chiasm.common.half_load import CheckpointError
from chiasm.common.launch import keep_loaded
from chiasm.common.limits import Limits
from chiasm.common.logging import configure_logging
from chiasm.common.media import Modality
from chiasm.common.media_resolver import MediaResolver
from chiasm.common.metrics import MetricsPortError, start_metrics_server, watch_loop
from chiasm.common.own_thread import compute_alone_in_pool, run_in_own_thread
from chiasm.common.private_file import PrivateFileError
from chiasm.common.secrets import StoreSecrets, StoreSecretsError
from chiasm.common.service_token import ServiceTokenError, load_service_token
from chiasm.common.single_flight import SingleFlight
from chiasm.encoder.admission import Admission, AdmissionLimits
from chiasm.encoder.batcher import BatchLimits, EncodeBatcher
from chiasm.encoder.catalog import Catalog
from chiasm.encoder.checkpoint import EncoderCheckpoint
from chiasm.encoder.config import EncoderSettings
from chiasm.encoder.decode_pool import DecodeLimits, DecodePool
from chiasm.encoder.fetch import FetchLimits, MediaFetcher, SystemResolver
from chiasm.encoder.frames_reader import FramesReader
from chiasm.encoder.fused.description import UnsupportedTowerError
from chiasm.encoder.fused.fuse_tower import TowerRequest
from chiasm.encoder.item_encoder import Encoded, ItemEncoder, Stages
from chiasm.encoder.local_files import LocalFiles
from chiasm.encoder.pipeline import EncodePipeline, PipelineParts
from chiasm.encoder.preprocess import MediaLimits
from chiasm.encoder.ready_embeddings import ReadyEmbeddings
from chiasm.encoder.servicer import EncoderServicer
from chiasm.encoder.source_reader import SourceReader
from chiasm.encoder.url_policy import UrlPolicy
from chiasm.kernels.cpu.native import KernelsUnavailableError
from chiasm.v1.encoder_pb2 import DESCRIPTOR
from chiasm.v1.encoder_pb2_grpc import add_EncoderServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger("chiasm.encoder")

_GPU_BATCH_ITEMS = 16
_START_ERRORS = (
    AddressInUseError,
    CheckpointError,
    CorePageError,
    DeviceUnavailableError,
    KernelsUnavailableError,
    MetricsPortError,
    PrivateFileError,
    ServiceTokenError,
    StoreSecretsError,
    UnsupportedModelError,
    UnsupportedTowerError,
    OSError,
    torch.OutOfMemoryError,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the encoder until SIGTERM or SIGINT.

    Args:
        argv: Flags, without the program's name; the process's own if ``None``.
    """
    settings = load_settings_or_exit(
        EncoderSettings, "encoder", sys.argv[1:] if argv is None else argv
    )
    configure_logging("encoder", settings.log_level)
    log.info("settings_resolved", **settings.log_fields())
    try:
        uvloop.run(_serve(settings))
    except _START_ERRORS as error:
        log.error("start_failed", reason=str(error))
        raise SystemExit(1) from None


async def _serve(settings: EncoderSettings) -> None:
    watch_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with AsyncExitStack() as stack:
        server = GrpcServer(
            address=settings.listen,
            service_names=[DESCRIPTOR.services_by_name["EncoderService"].full_name],
            token=load_service_token(settings.service_token_file),
            max_message_bytes=Limits().max_message_bytes,
        )
        if settings.metrics_port is not None:
            stack.callback(start_metrics_server(settings.metrics_port, settings.listen))
        encoder = await _build(settings, server, stack)
        port = await server.start()
        stack.push_async_callback(server.stop, settings.drain_s)
        await encoder.warm_up()
        keep_loaded()
        await server.set_serving(True)
        log.info("serving", port=port)
        await stop.wait()
        log.info("draining", drain_s=settings.drain_s)


async def _build(
    settings: EncoderSettings, server: GrpcServer, stack: AsyncExitStack
) -> ItemEncoder:
    """Build all parts, register the servicer; ``stack`` stops the parts in reverse order."""
    compute_alone_in_pool()
    checkpoint = await run_in_own_thread(
        EncoderCheckpoint.load,
        settings.tower.model,
        settings.tower.dtype,
        settings.tower.device,
        MediaLimits(
            max_image_pixels=settings.decode.max_image_pixels,
            max_video_frames=settings.decode.max_video_frames,
            max_video_pixels=settings.decode.max_video_pixels,
            max_source_frames=settings.decode.max_video_source_frames,
            max_video_duration_s=settings.decode.max_video_duration_s,
            max_audio_duration_s=settings.decode.max_audio_duration_s,
        ),
        TowerRequest(
            settings.tower.tower, settings.tower.cpu_kernels, settings.tower.tower_quantization
        ),
    )
    log.info(
        "checkpoint_loaded",
        num_parameter_bytes=checkpoint.tower.num_parameter_bytes,
        fingerprint=checkpoint.fingerprint.hex(),
    )
    description = checkpoint.describe(
        settings.model_name,
        max_source_bytes=Limits().max_source_bytes,
        max_pixels=settings.decode.max_image_pixels,
    )
    secrets = StoreSecrets.load_or_create(settings.store_secret_file)
    store = _connect_store(settings, secrets)
    stack.push_async_callback(store.close)
    resolver = MediaResolver(store, secrets, description.fingerprint)
    admission = _build_admission(settings)
    decoder = _build_decoder(settings)
    decoder.start()
    stack.callback(decoder.stop)
    encoder = _build_item_encoder(settings, checkpoint, decoder, store, admission, stack)
    fetcher = _build_fetcher(settings, description.max_source_bytes)
    await fetcher.start()
    stack.push_async_callback(fetcher.stop)
    local_files = LocalFiles(settings.fetch.allowed_local_media_path)
    reader = SourceReader(fetcher, local_files, description.max_source_bytes)
    flights: SingleFlight[Encoded] = SingleFlight(store)
    stack.push_async_callback(flights.close)
    ready = ReadyEmbeddings(reader, decoder, checkpoint.row_planner, description, Limits())
    frames = FramesReader(reader, description.max_source_bytes)
    parts = PipelineParts(admission, resolver, store, flights, reader, frames, ready, encoder)
    servicer = EncoderServicer(
        EncodePipeline(parts, description), Catalog(store, resolver), encoder, description
    )
    add_EncoderServiceServicer_to_server(servicer, server.server)
    return encoder


def _connect_store(settings: EncoderSettings, secrets: StoreSecrets) -> EmbeddingStore:
    return EmbeddingStore.connect(
        settings.redis_url,
        secrets,
        settings.store_ttl_s,
        CallBudget.of(settings.store_timeout_s),
        settings.store_tenant_bytes,
    )


def _build_admission(settings: EncoderSettings) -> Admission:
    return Admission(
        AdmissionLimits(
            max_items=settings.admission.max_items,
            max_source_bytes=settings.admission.max_queue_source_bytes,
            max_pixels=settings.admission.max_queue_pixels,
            max_wait_s=settings.admission.max_wait_s,
        )
    )


def _build_decoder(settings: EncoderSettings) -> DecodePool:
    return DecodePool(
        settings.num_decode_workers,
        DecodeLimits(
            memory_bytes=settings.decode.decode_memory_bytes,
            cpu_limit_s=settings.decode.decode_cpu_s,
            video_cpu_limit_s=settings.decode.video_decode_cpu_s,
            timeout_s=settings.decode.decode_timeout_s,
        ),
    )


def _build_item_encoder(
    settings: EncoderSettings,
    checkpoint: EncoderCheckpoint,
    decoder: DecodePool,
    store: EmbeddingStore,
    admission: Admission,
    stack: AsyncExitStack,
) -> ItemEncoder:
    is_cpu = checkpoint.tower.device.type == "cpu"
    batch_items = settings.tower.max_batch_items or (1 if is_cpu else _GPU_BATCH_ITEMS)
    cores = open_cores(settings.core_page, "encoder", settings.cores)
    threads = ComputeThreads(cores)
    if is_cpu:
        checkpoint.tower.call_before_layers(threads.adjust)
    batcher = EncodeBatcher(
        checkpoint.tower, threads, BatchLimits(batch_items, settings.tower.max_batch_pixels)
    )
    batcher.start()
    stack.push_async_callback(batcher.stop)
    encoder = ItemEncoder(
        Stages(decoder, checkpoint.preprocessors, batcher, store),
        admission,
        max_in_work=max(settings.admission.max_items_in_work, 2 * batch_items),
        num_threads=settings.num_preprocess_threads,
    )
    stack.callback(encoder.stop)
    return encoder


def _build_fetcher(settings: EncoderSettings, max_bytes: int) -> MediaFetcher:
    policy = UrlPolicy(
        allowed_domains=frozenset(settings.fetch.allowed_media_domains),
        allowed_networks=tuple(
            ipaddress.ip_network(network) for network in settings.fetch.allow_private_media
        ),
    )
    limits = FetchLimits(
        max_bytes=max_bytes,
        max_redirects=settings.fetch.media_redirects,
        timeouts_s={
            Modality.IMAGE: settings.fetch.image_fetch_timeout_s,
            Modality.VIDEO: settings.fetch.video_fetch_timeout_s,
            Modality.AUDIO: settings.fetch.audio_fetch_timeout_s,
        },
    )
    return MediaFetcher(policy, limits, SystemResolver())
