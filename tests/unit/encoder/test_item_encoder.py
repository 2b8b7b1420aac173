"""The way of an item through the stages: what one item holds up, and what it does not."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    Modality,
    ProcessingOptions,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.encoder.admission import Admission, AdmissionLimits
from chiasm.encoder.batcher import TowerRows
from chiasm.encoder.item_encoder import ItemEncoder, NonFiniteEmbeddingError, Stages
from chiasm.encoder.media_buffers import DecodedMedia, MediaBuffer
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.preprocess import Decoding, PlannedItem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chiasm.common.media import Embedding

_PATIENCE_S = 5.0
_WIDTH = 4


class _Stages:
    """All stages at once: they answer at once, but the store only when it may."""

    def __init__(self) -> None:
        self.rows = torch.ones(1, _WIDTH)
        self.encoded: asyncio.Queue[None] = asyncio.Queue()
        self.may_store = asyncio.Event()
        self.is_store_down = False
        self.num_stored = 0
        self.media: list[MediaBuffer] = []
        self.freed: list[MediaBuffer] = []
        self.views: list[memoryview] = []
        self.has_views = False

    async def decode(self, *arguments: object) -> DecodedMedia:
        self.media.append(MediaBuffer(1))
        return DecodedMedia(self.media[-1], 1, self.freed.append)

    def run(self, item: PlannedItem, media: memoryview) -> str:
        if self.has_views:
            self.views.append(memoryview(media))
        return "inputs"

    async def submit(self, inputs: object) -> TowerRows:
        await self.encoded.put(None)
        return TowerRows(self.rows, 0.0)

    async def put(self, tenant: str, embedding: Embedding, layout: MediaLayout, ttl_s: int) -> None:
        await self.may_store.wait()
        if self.is_store_down:
            raise StoreUnavailableError("The fake store is down.")
        self.num_stored += 1


@contextmanager
def _encoder(stages: _Stages, max_in_work: int) -> Iterator[ItemEncoder]:
    admission = Admission(AdmissionLimits(9, 1 << 20, 1 << 20))
    stage = cast("Any", stages)
    parts = Stages(stage, {Modality.IMAGE: stage}, batcher=stage, store=stage)
    encoder = ItemEncoder(parts, admission, max_in_work, num_threads=1)
    try:
        yield encoder
    finally:
        encoder.stop()


def _image() -> PlannedItem:
    layout = MediaLayout((TokenRun(1, 1, is_embedding=True),))
    source = MemoryFile.of_bytes(b"x")
    decoding = Decoding(b"", (1,))
    return PlannedItem(Modality.IMAGE, source, ProcessingOptions(), layout, 4, 4, decoding)


def _ref(number: int) -> EmbeddingRef:
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (1, _WIDTH))
    return EmbeddingRef(bytes([number]) * 32, bytes(32), Modality.IMAGE, (spec,))


async def test_items_go_through_the_tower_while_others_are_being_stored() -> None:
    stages = _Stages()
    with _encoder(stages, max_in_work=1) as encoder:
        calls = [asyncio.create_task(encoder.encode("a", _image(), _ref(i))) for i in range(3)]
        for _ in calls:
            await asyncio.wait_for(stages.encoded.get(), _PATIENCE_S)

        assert stages.num_stored == 0
        stages.may_store.set()
        encoded = await asyncio.wait_for(asyncio.gather(*calls), _PATIENCE_S)

    assert stages.num_stored == len(calls)
    assert all(item.is_stored for item in encoded)


async def test_item_that_the_store_does_not_take_is_encoded_all_the_same() -> None:
    stages = _Stages()
    stages.is_store_down = True
    stages.may_store.set()
    with _encoder(stages, max_in_work=1) as encoder:
        encoded = await encoder.encode("a", _image(), _ref(0))

    assert not encoded.is_stored
    assert bytes(encoded.embedding.buffers[0]) == stages.rows.numpy().tobytes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
async def test_embedding_that_is_not_finite_is_not_stored(value: float) -> None:
    stages = _Stages()
    stages.rows[0, -1] = value
    stages.may_store.set()
    with _encoder(stages, max_in_work=1) as encoder, pytest.raises(NonFiniteEmbeddingError):
        await encoder.encode("a", _image(), _ref(0))

    assert stages.num_stored == 0


@pytest.mark.parametrize("has_views", [False, True], ids=["copied", "viewed"])
async def test_decoded_media_are_freed_once_the_tower_has_its_inputs(*, has_views: bool) -> None:
    stages = _Stages()
    stages.has_views = has_views
    stages.may_store.set()
    with _encoder(stages, max_in_work=1) as encoder:
        await encoder.encode("a", _image(), _ref(0))

    assert stages.freed == ([] if has_views else stages.media)
