"""Wire and run the generator service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import sys
from typing import TYPE_CHECKING

import structlog
import torch
import uvloop

import chiasm
from chiasm.common.compute_threads import ComputeThreads
from chiasm.common.config import load_settings_or_exit
from chiasm.common.cores import CorePageError, open_cores
from chiasm.common.device import DeviceUnavailableError, find_device
from chiasm.common.embedding_store import EmbeddingStore
from chiasm.common.families import UnsupportedModelError
from chiasm.common.grpc_server import AddressInUseError, GrpcServer
from chiasm.common.guarded_redis import CallBudget
from chiasm.common.half_load import CheckpointError
from chiasm.common.launch import keep_loaded
from chiasm.common.limits import Limits
from chiasm.common.logging import configure_logging
from chiasm.common.media import RequestContext
from chiasm.common.metrics import MetricsPortError, start_metrics_server, watch_loop
from chiasm.common.own_thread import compute_alone_in_pool, run_in_own_thread
from chiasm.common.sampling import SamplingWishes
from chiasm.common.secrets import StoreSecrets, StoreSecretsError
from chiasm.common.service_token import ServiceTokenError, load_service_token
from chiasm.generator.admission import Admission, GenerationRequest
from chiasm.generator.config import GeneratorSettings
from chiasm.generator.embedding_loader import EmbeddingLoader
from chiasm.generator.engine.async_engine import AsyncEngine, EngineDeadError
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.engine.engine import Engine
from chiasm.generator.engine.grammar import GrammarCompiler
from chiasm.generator.engine.observers import StepMetrics, StepTrace
from chiasm.generator.engine.queue_budget import QueueBudget, QueueLimits
from chiasm.generator.engine.sampler import Sampler
from chiasm.generator.engine.scheduler import Scheduler, SchedulerLimits
from chiasm.generator.engine.step_cost import StepCost
from chiasm.generator.generation import GenerationService
from chiasm.generator.guides import Guides
from chiasm.generator.info import GeneratorInfo
from chiasm.generator.model.cache_sizes import CacheRequest, CacheTooSmallError
from chiasm.generator.model.fused.description import UnsupportedDecoderError
from chiasm.generator.model.load import load_model, replay_steps
from chiasm.generator.model.runner import ModelRunner
from chiasm.generator.servicer import GeneratorServicer
from chiasm.kernels.cpu.native import KernelsUnavailableError
from chiasm.v1.generator_pb2 import DESCRIPTOR
from chiasm.v1.generator_pb2_grpc import add_GeneratorServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from chiasm.generator.engine.step_report import StepObserver
    from chiasm.generator.model.load import LoadedModel
    from chiasm.generator.span_tracker import SpanUpdate

SERVICE_NAME = DESCRIPTOR.services_by_name["GeneratorService"].full_name

log = structlog.get_logger("chiasm.generator")

# On a CPU a step reads all weights while the encoder may be at work on the same cores: text before
# a picture saves as much later as such a step takes if it is about as long as this.
_MIN_EARLY_TOKENS = 128

_START_ERRORS = (
    AddressInUseError,
    CacheTooSmallError,
    CheckpointError,
    CorePageError,
    DeviceUnavailableError,
    KernelsUnavailableError,
    MetricsPortError,
    ServiceTokenError,
    StoreSecretsError,
    UnsupportedDecoderError,
    UnsupportedModelError,
    torch.OutOfMemoryError,
)


class Generator:
    """The generator with all its parts, built from settings and a loaded model."""

    def __init__(self, settings: GeneratorSettings, loaded: LoadedModel) -> None:
        scheduling = settings.scheduling
        self._settings = settings
        self._loaded = loaded
        self._blocks = BlockManager(
            loaded.layout.sizes,
            loaded.layout.block_size,
            settings.cache.enable_prefix_caching,
        )
        is_cpu = loaded.decoder.device.type == "cpu"
        least = _MIN_EARLY_TOKENS if is_cpu else 1
        chunking = dataclasses.replace(settings.chunking, min_early_tokens=least)
        limits = SchedulerLimits(
            scheduling.max_step_tokens, scheduling.max_running_sequences, chunking
        )
        self._trace = StepTrace(settings.step_trace) if settings.step_trace else None
        observers: list[StepObserver] = [StepMetrics(settings.model_name, loaded.layout.num_blocks)]
        if self._trace:
            observers.append(self._trace)
        cores = open_cores(settings.core_page, "generator", settings.cores)
        threads = ComputeThreads(cores)
        if is_cpu:
            loaded.decoder.call_before_layers(threads.adjust)
        runner = ModelRunner(
            loaded.decoder,
            Sampler(),
            threads.begin,
            scheduling.deterministic,
            scheduling.max_step_tokens,
        )
        scheduler = Scheduler(self._blocks, limits, StepCost(scheduling.max_step_ms / 1000))
        engine = Engine(scheduler, runner, observers)
        budget = QueueBudget(
            QueueLimits(
                scheduling.max_waiting_sequences,
                scheduling.max_waiting_tokens,
                scheduling.max_embedding_bytes,
            )
        )
        self.engine = AsyncEngine(engine, budget, threads)
        self._store = _connect_store(settings)
        self._guides = Guides(_make_compiler(settings, loaded))
        loader = EmbeddingLoader(self._store, loaded.dtype, settings.cache.embedding_cache_bytes)
        admission = Admission(
            loaded.decoder.spec, settings.model_name, loaded.max_model_len, Limits()
        )
        self.service = GenerationService(
            admission, self.engine, loader, self._guides, scheduling.span_wait_s
        )

    def describe(self) -> GeneratorInfo:
        """Return the description that callers get."""
        spec = self._loaded.decoder.spec
        return GeneratorInfo(
            model=self._settings.model_name,
            max_model_len=self._loaded.max_model_len,
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            block_size=self._blocks.block_size,
            num_blocks=self._blocks.num_blocks,
            num_used_blocks=self._blocks.num_used_blocks,
            eos_token_ids=tuple(sorted(spec.eos_token_ids)),
            version=chiasm.__version__,
        )

    @property
    def num_warm_up_tokens(self) -> int:
        """Tokens of the prompt that proves that a forward succeeds."""
        if self._loaded.decoder.device.type == "cpu":
            return 1
        most = self._settings.scheduling.max_step_tokens
        return min(most, self._loaded.max_model_len - 1)

    async def close(self) -> None:
        """Stop the engine and let go of what is outside the process."""
        await self.engine.stop()
        self._guides.close()
        if self._store is not None:
            await self._store.close()
        if self._trace is not None:
            self._trace.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the generator until SIGTERM or SIGINT; exit status 1 if it cannot start or dies."""
    settings = load_settings_or_exit(
        GeneratorSettings, "generator", sys.argv[1:] if argv is None else argv
    )
    configure_logging("generator", settings.log_level)
    log.info("settings_resolved", **settings.log_fields())
    try:
        uvloop.run(_serve(settings))
    except _START_ERRORS as error:
        log.error("generator_not_started", reason=str(error))
        raise SystemExit(1) from None
    except EngineDeadError:
        raise SystemExit(1) from None


async def _serve(settings: GeneratorSettings) -> None:
    watch_loop()
    token = load_service_token(settings.service_token_file)
    compute_alone_in_pool()
    loaded = await run_in_own_thread(_load, settings)
    generator = Generator(settings, loaded)
    server = GrpcServer(address=settings.listen, service_names=[SERVICE_NAME], token=token)
    servicer = GeneratorServicer(generator.service, generator.describe)
    add_GeneratorServiceServicer_to_server(servicer, server.server)
    stop_metrics = None
    if settings.metrics_port is not None:
        stop_metrics = start_metrics_server(settings.metrics_port, settings.listen)
    stop_requested = _catch_signals()
    generator.engine.start()
    try:
        port = await server.start()
        await _warm_up(generator)
        keep_loaded()
        await server.set_serving(True)
        log.info("generator_ready", port=port, **dataclasses.asdict(generator.describe()))
        await _wait_for_end(stop_requested, generator.engine)
        log.info("generator_draining", num_sequences=generator.engine.num_sequences)
        generator.service.drain()
        await server.stop(settings.drain_s)
    finally:
        await server.stop(0)
        await generator.close()
        if stop_metrics is not None:
            stop_metrics()


def _load(settings: GeneratorSettings) -> LoadedModel:
    model, cache = settings.language_model, settings.cache
    request = CacheRequest(
        block_size=cache.block_size,
        budget_bytes=cache.kv_cache_bytes,
        num_blocks=cache.num_blocks,
        max_model_len=model.max_model_len,
        max_sequences=settings.scheduling.max_running_sequences,
        chunk_tokens=max(settings.scheduling.max_step_tokens, settings.chunking.fixed_tokens),
        kernels=model.cpu_kernels,
        device_share=cache.gpu_memory_utilization,
    )
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    loaded = load_model(
        model.model, dtype, find_device(model.device), request, model.decoder, model.quantization
    )
    if model.enforce_eager:
        return loaded
    scheduling = settings.scheduling
    return replay_steps(loaded, scheduling.max_running_sequences, scheduling.max_step_tokens)


def _make_compiler(settings: GeneratorSettings, loaded: LoadedModel) -> GrammarCompiler | None:
    path = settings.language_model.model / "tokenizer.json"
    spec = loaded.decoder.spec
    if not path.exists() or not spec.eos_token_ids:
        return None
    return GrammarCompiler(path.read_text("utf-8"), spec.vocab_size, spec.eos_token_ids)


def _connect_store(settings: GeneratorSettings) -> EmbeddingStore | None:
    if not settings.redis_url:
        return None
    secrets = StoreSecrets.load(settings.store_secret_file)
    budget = CallBudget.of(settings.store_timeout_s)
    return EmbeddingStore.connect(settings.redis_url, secrets, settings.store_ttl_s, budget)


async def _warm_up(generator: Generator) -> None:
    """Prove that a forward succeeds, and let libraries do what they do on the first one.

    On a GPU it is the largest forward that there may be: memory must suffice for it.
    """
    context = RequestContext(request_id="warm-up", attempt_id="warm-up", tenant="warm-up")
    wishes = SamplingWishes(max_tokens=2, temperature=0.0, ignore_eos=True)
    # A context of two tokens is the least that a generator may have: one of them is output.
    token_ids = (0,) * generator.num_warm_up_tokens
    request = GenerationRequest(context, token_ids, spans=(), wishes=wishes)
    async with contextlib.aclosing(generator.service.generate(request, _no_updates())) as events:
        async for _ in events:
            pass


async def _no_updates() -> AsyncIterator[SpanUpdate]:
    """Yield nothing."""
    updates: tuple[SpanUpdate, ...] = ()
    for update in updates:
        yield update


def _catch_signals() -> asyncio.Event:
    stop_requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_requested.set)
    return stop_requested


async def _wait_for_end(stop_requested: asyncio.Event, engine: AsyncEngine) -> None:
    """Return when a signal asks to stop; raise ``EngineDeadError`` if the engine dies before."""
    death = asyncio.create_task(engine.wait_dead())
    stop = asyncio.create_task(stop_requested.wait())
    await asyncio.wait([death, stop], return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        death.cancel()
        return
    stop.cancel()
    await death
