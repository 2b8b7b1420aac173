"""Take one item through the stages: header, plan, decoding, preprocessing, tower, store."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog
import torch

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.finite import is_finite
from chiasm.common.media import Embedding, ProcessingOptions
from chiasm.common.metrics import (
    ENCODER_ENCODED_ITEMS,
    MEDIA_DECODE_LATENCY_SECONDS,
    PREPROCESSING_LATENCY_SECONDS,
)
from chiasm.encoder.commands import StageTimings
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.tower import bytes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.media import EmbeddingRef, MediaLayout, Modality
    from chiasm.encoder.admission import Admission
    from chiasm.encoder.batcher import EncodeBatcher, TowerRows
    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.preprocess import PlannedItem, Preprocessor

log = structlog.get_logger(__name__)


class NonFiniteEmbeddingError(Exception):
    """The tower gave NaN or infinity; the embedding must not be kept."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages that an item passes, in order."""

    decoder: DecodePool
    preprocessors: Mapping[Modality, Preprocessor]
    batcher: EncodeBatcher
    store: EmbeddingStore


@dataclass(frozen=True, slots=True)
class Encoded:
    """An embedding, whether and how long the store keeps it, and how long the stages took."""

    embedding: Embedding
    is_stored: bool
    timings: StageTimings
    ttl_s: int


class ItemEncoder:
    """Encodes items; at most ``max_in_work`` hold decoded media at one time, the others wait."""

    def __init__(
        self, stages: Stages, admission: Admission, max_in_work: int, num_threads: int
    ) -> None:
        self._stages = stages
        self._admission = admission
        self._in_work = asyncio.Semaphore(max_in_work)
        # Preprocessing threads compute with one core each; the tower's thread takes the rest.
        self._threads = ThreadPoolExecutor(
            num_threads, "preprocess", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._num_encoded_items = 0

    @property
    def num_encoded_items(self) -> int:
        """Items that went through the tower since the start."""
        return self._num_encoded_items

    async def plan(
        self, modality: Modality, source: MemoryFile, options: ProcessingOptions
    ) -> PlannedItem:
        """Read the header of an item and plan it; nothing is decoded.

        Args:
            modality: Kind of the item; one that the checkpoint takes.
            source: The file's bytes.
            options: The client's wishes.

        Raises:
            InvalidRequestError: It is not a file that can be processed.
            TooLargeError: It is over a limit.
            OverloadedError: No decoder was free in time.
        """
        preprocessor = self._stages.preprocessors[modality]
        return await preprocessor.plan(self._stages.decoder, source, options)

    async def encode(
        self, tenant: str, item: PlannedItem, ref: EmbeddingRef, ttl_s: int = 0
    ) -> Encoded:
        """Encode an item and put its embedding into the store, if the store can take it.

        Args:
            tenant: Tenant that it belongs to.
            item: The item.
            ref: What its embedding is called.
            ttl_s: Seconds the store keeps it after each use; 0: as it keeps everything.

        Raises:
            InvalidRequestError: The item cannot be decoded or processed.
            OverloadedError: No decoder was free in time.
        """
        output, timings = await self._compute(item)
        # The warm-up is not learned from: its picture is tiny and its forward the slowest.
        self._admission.observe(item.num_pixels, output.work_s)
        self._num_encoded_items += 1
        ENCODER_ENCODED_ITEMS.labels(ref.modality.value).inc()
        parts = torch.chunk(output.rows, len(ref.tensors), dim=1)
        embedding = Embedding(ref, [bytes_of(part.contiguous()) for part in parts])
        return await self.keep(tenant, embedding, item.layout, timings, ttl_s)

    async def keep(
        self,
        tenant: str,
        embedding: Embedding,
        layout: MediaLayout,
        timings: StageTimings,
        ttl_s: int = 0,
    ) -> Encoded:
        """Put an embedding into the store, if the store can take it.

        Args:
            tenant: Tenant that it belongs to.
            embedding: The embedding.
            layout: How it stands in the prompt.
            timings: Seconds of the stages before this one.
            ttl_s: Seconds the store keeps it after each use; 0: as it keeps everything.
        """
        started = time.monotonic()
        is_stored = True
        try:
            await self._stages.store.put(tenant, embedding, layout, ttl_s)
        except StoreUnavailableError as error:
            is_stored = False
            log.warning("embedding_not_stored", reason=error.reason)
        store_s = time.monotonic() - started
        return Encoded(embedding, is_stored, replace(timings, store_s=store_s), ttl_s)

    async def warm_up(self) -> None:
        """Run an item of each kind through every stage but the store; raises what these raise."""
        for modality, preprocessor in self._stages.preprocessors.items():
            source = MemoryFile.of_bytes(preprocessor.sample)
            await self._compute(await self.plan(modality, source, ProcessingOptions()))

    def stop(self) -> None:
        """End the preprocessing threads."""
        self._threads.shutdown()

    async def _compute(self, item: PlannedItem) -> tuple[TowerRows, StageTimings]:
        preprocessor = self._stages.preprocessors[item.modality]
        async with self._in_work:
            started = time.monotonic()
            media = await self._stages.decoder.decode(
                item.modality, item.source, item.decoding.task, item.decoding.num_bytes
            )
            decoded = time.monotonic()
            try:
                inputs = await asyncio.get_running_loop().run_in_executor(
                    self._threads, preprocessor.run, item, media.memory
                )
            finally:
                # In a thread and behind the item's back: it may take milliseconds per megapixel.
                self._threads.submit(media.free)
            preprocessed = time.monotonic()
            output = await self._stages.batcher.submit(inputs)
        if not await asyncio.to_thread(is_finite, output.rows):
            raise NonFiniteEmbeddingError
        encoded = time.monotonic()
        timings = StageTimings(
            decode_s=decoded - started,
            preprocess_s=preprocessed - decoded,
            encode_s=encoded - preprocessed,
        )
        modality = item.modality.value
        MEDIA_DECODE_LATENCY_SECONDS.labels(modality).observe(timings.decode_s)
        PREPROCESSING_LATENCY_SECONDS.labels(modality).observe(timings.preprocess_s)
        return output, timings
