"""Take one picture through the stages: header, plan, pixels, preprocessing, tower, store."""

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
from chiasm.common.media import Embedding, Modality, ProcessingOptions
from chiasm.common.metrics import (
    ENCODER_ENCODED_ITEMS,
    MEDIA_DECODE_LATENCY_SECONDS,
    PREPROCESSING_LATENCY_SECONDS,
)
from chiasm.encoder.commands import StageTimings
from chiasm.encoder.pixels import ImageHeader, MemoryFile
from chiasm.encoder.tower import bytes_of

if TYPE_CHECKING:
    from chiasm.common.embedding_store import EmbeddingStore
    from chiasm.common.families import ImagePlan
    from chiasm.common.media import EmbeddingRef
    from chiasm.encoder.admission import Admission
    from chiasm.encoder.batcher import EncodeBatcher, TowerRows
    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.preprocess import ImagePreprocessor

log = structlog.get_logger(__name__)

_WHITE = 0xFFFFFF
_ONE_PIXEL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415408d763f8ffff3f0005fe02fedccc59e70000000049454e44ae426082"
)


class NonFiniteEmbeddingError(Exception):
    """The tower gave NaN or infinity; the embedding must not be kept."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages that an item passes, in order."""

    decoder: DecodePool
    preprocessor: ImagePreprocessor
    batcher: EncodeBatcher
    store: EmbeddingStore


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """A picture whose header was read.

    Attributes:
        source: The file's bytes.
        header: Size of the picture.
        plan: What it becomes.
        options: The client's wishes.
    """

    source: MemoryFile
    header: ImageHeader
    plan: ImagePlan
    options: ProcessingOptions

    @property
    def num_pixels(self) -> int:
        """Pixels of the larger of the decoded and the resized picture."""
        return max(self.header.num_pixels, self.plan.num_pixels)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An embedding, whether the store took it, and how long the stages took."""

    embedding: Embedding
    is_stored: bool
    timings: StageTimings


class ItemEncoder:
    """Encodes pictures; at most ``max_in_work`` hold pixels at one time, the others wait."""

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

    async def plan(self, source: MemoryFile, options: ProcessingOptions) -> PlannedImage:
        """Read the header of a picture and plan it; no pixel is decoded.

        Raises:
            InvalidRequestError: It is not a picture that can be processed.
            TooLargeError: It has too many pixels.
        """
        header = await self._stages.decoder.probe(source)
        plan = self._stages.preprocessor.planner.plan(header.height, header.width, options)
        return PlannedImage(source, header, plan, options)

    async def encode(self, tenant: str, image: PlannedImage, ref: EmbeddingRef) -> Encoded:
        """Encode a picture and put its embedding into the store, if the store can take it.

        Raises:
            InvalidRequestError: The picture cannot be decoded or processed.
            OverloadedError: No decoder was free in time.
        """
        output, timings = await self._compute(image)
        # The warm-up is not learned from: its picture is tiny and its forward the slowest.
        self._admission.observe(image.num_pixels, output.work_s)
        self._num_encoded_items += 1
        ENCODER_ENCODED_ITEMS.labels(ref.modality.value).inc()
        embedding = Embedding(ref, [bytes_of(output.rows)])
        started = time.monotonic()
        is_stored = True
        try:
            await self._stages.store.put(tenant, embedding, image.plan.layout)
        except StoreUnavailableError as error:
            is_stored = False
            log.warning("embedding_not_stored", reason=error.reason)
        store_s = time.monotonic() - started
        return Encoded(embedding, is_stored, replace(timings, store_s=store_s))

    async def warm_up(self) -> None:
        """Run a picture through every stage but the store; raises what any of them raises."""
        image = await self.plan(MemoryFile.of_bytes(_ONE_PIXEL_PNG), ProcessingOptions())
        await self._compute(image)

    def stop(self) -> None:
        """End the preprocessing threads."""
        self._threads.shutdown()

    async def _compute(self, image: PlannedImage) -> tuple[TowerRows, StageTimings]:
        async with self._in_work:
            started = time.monotonic()
            background = image.options.background_rgb
            pixels = await self._stages.decoder.decode(
                image.source, image.header, _WHITE if background is None else background
            )
            decoded = time.monotonic()
            inputs = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._stages.preprocessor.run, pixels, image.options
            )
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
        MEDIA_DECODE_LATENCY_SECONDS.labels(Modality.IMAGE.value).observe(timings.decode_s)
        PREPROCESSING_LATENCY_SECONDS.labels(Modality.IMAGE.value).observe(timings.preprocess_s)
        return output, timings
