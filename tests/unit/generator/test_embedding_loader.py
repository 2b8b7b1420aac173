"""Embeddings in host memory: loaded once, kept within bytes, checked."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from chiasm.common.errors import InvalidRequestError
from chiasm.common.host_memory import allocate
from chiasm.common.media import DataType, Embedding, EmbeddingRef, Modality, TensorRole, TensorSpec
from chiasm.generator.embedding_loader import EmbeddingLoader
from tests.fakes.embedding_source import FakeEmbeddingSource

ROWS = 3
WIDTH = 4
ROW_BYTES = ROWS * WIDTH * 4


def _embedding(number: int, fill: float = 1.5) -> Embedding:
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (ROWS, WIDTH))
    ref = EmbeddingRef(bytes([number]) * 32, b"f" * 32, Modality.IMAGE, (spec,))
    return Embedding(ref, [memoryview(struct.pack("<f", fill) * (ROWS * WIDTH)).toreadonly()])


def _loader(source: FakeEmbeddingSource | None, max_bytes: int = 10 * ROW_BYTES) -> EmbeddingLoader:
    return EmbeddingLoader(source, torch.float32, max_bytes)


def _num_lookups(result: str) -> float:
    name = "chiasm_generator_embedding_cache_lookups_total"
    return REGISTRY.get_sample_value(name, {"result": result}) or 0.0


async def test_rows_come_from_the_store_once_and_then_from_memory() -> None:
    source, embedding = FakeEmbeddingSource(), _embedding(1)
    source.put("a", embedding)
    loader = _loader(source)

    first = await loader.load("a", embedding.ref)
    source.is_down = True
    second = await loader.load("a", embedding.ref)

    assert first is second
    assert first is not None
    assert first.tolist() == [[1.5] * WIDTH] * ROWS
    assert source.num_gets == 1


async def test_deepstack_rows_stand_behind_the_spliced_ones() -> None:
    spliced = _embedding(1)
    levels = [
        replace(spliced.ref.tensors[0], role=TensorRole.DEEPSTACK, level=level) for level in (0, 1)
    ]
    ref = replace(spliced.ref, tensors=(*spliced.ref.tensors, *levels))
    buffers = [_embedding(1, fill).buffers[0] for fill in (1.0, 2.0, 3.0)]
    source = FakeEmbeddingSource()
    source.put("a", Embedding(ref, buffers))
    loader = _loader(source)

    rows = await loader.load("a", ref)
    again = await loader.load("a", ref)

    assert rows is not None
    assert rows.tolist() == [[1.0] * WIDTH + [2.0] * WIDTH + [3.0] * WIDTH] * ROWS
    assert again is rows
    assert await loader.load("a", spliced.ref) is not rows


async def test_loads_at_once_share_one_get() -> None:
    source, embedding = FakeEmbeddingSource(), _embedding(1)
    source.put("a", embedding)
    source.may_answer.clear()
    loader = _loader(source)
    loads = [asyncio.create_task(loader.load("a", embedding.ref)) for _ in range(4)]
    await asyncio.sleep(0)

    loads[0].cancel()
    source.may_answer.set()
    results = await asyncio.gather(*loads, return_exceptions=True)

    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(rows, torch.Tensor) for rows in results[1:])
    assert source.num_gets == 1


async def test_loads_at_once_of_one_id_but_other_shapes_are_not_shared() -> None:
    source, embedding = FakeEmbeddingSource(), _embedding(1)
    source.put("a", embedding)
    loader = _loader(source)
    spec = dataclasses.replace(embedding.ref.tensors[0], shape=(WIDTH, ROWS))
    other = dataclasses.replace(embedding.ref, tensors=(spec,))

    right, wrong = await asyncio.gather(loader.load("a", embedding.ref), loader.load("a", other))

    assert right is not None
    assert right.shape == (ROWS, WIDTH)
    assert wrong is None
    assert await loader.load("a", other) is None


async def test_load_that_fails_after_all_callers_left_is_no_loose_end() -> None:
    source, embedding = FakeEmbeddingSource(), _embedding(1, fill=np.nan)
    source.put("a", embedding)
    source.may_answer.clear()
    loader = _loader(source)
    load = asyncio.create_task(loader.load("a", embedding.ref))
    await asyncio.sleep(0)
    load.cancel()
    source.may_answer.set()
    with pytest.raises(asyncio.CancelledError):
        await load

    with pytest.raises(InvalidRequestError):
        await loader.load("a", embedding.ref)
    assert source.num_gets in (1, 2)


@pytest.mark.parametrize("num_rows", [ROWS, 1 << 18])
async def test_rows_of_the_type_of_the_model_are_the_memory_that_the_store_filled(
    num_rows: int,
) -> None:
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (num_rows, WIDTH))
    ref = EmbeddingRef(bytes(32), b"f" * 32, Modality.IMAGE, (spec,))
    memory = allocate(spec.num_bytes)

    rows = await _loader(None).accept("a", Embedding(ref, [memory.toreadonly()]))

    assert rows.data_ptr() == np.frombuffer(memory, np.uint8).ctypes.data


async def test_part_of_a_larger_memory_is_copied_and_not_confused() -> None:
    embedding = _embedding(1)
    memory = memoryview(bytearray(b"x" * 4 + bytes(embedding.buffers[0]))).toreadonly()

    rows = await _loader(None).accept("a", Embedding(embedding.ref, [memory[4:]]))

    assert rows.tolist() == [[1.5] * WIDTH] * ROWS


async def test_a_repeated_picture_is_counted_as_a_hit_and_its_bytes_once() -> None:
    source, embedding = FakeEmbeddingSource(), _embedding(1)
    source.put("a", embedding)
    loader = _loader(source)
    before = {result: _num_lookups(result) for result in ("hit", "miss")}

    for _ in range(3):
        await loader.load("a", embedding.ref)

    assert _num_lookups("hit") == before["hit"] + 2
    assert _num_lookups("miss") == before["miss"] + 1
    assert REGISTRY.get_sample_value("chiasm_generator_embedding_cache_bytes") == ROW_BYTES


async def test_tenants_do_not_see_each_other() -> None:
    source, embedding = FakeEmbeddingSource(), _embedding(1)
    source.put("a", embedding)
    loader = _loader(source)
    await loader.load("a", embedding.ref)

    assert await loader.load("b", embedding.ref) is None


async def test_store_that_is_down_is_a_miss() -> None:
    source, embedding = FakeEmbeddingSource(), _embedding(1)
    source.is_down = True

    assert await _loader(source).load("a", embedding.ref) is None
    assert await _loader(None).load("a", embedding.ref) is None


async def test_cache_keeps_the_last_used_within_its_bytes() -> None:
    source = FakeEmbeddingSource()
    embeddings = [_embedding(number) for number in range(3)]
    for embedding in embeddings:
        source.put("a", embedding)
    loader = _loader(source, max_bytes=2 * ROW_BYTES)

    for index in (0, 1, 0, 2):
        await loader.load("a", embeddings[index].ref)
    num_gets = source.num_gets
    await loader.load("a", embeddings[0].ref)

    assert source.num_gets == num_gets == 3
    assert loader.cache_bytes == 2 * ROW_BYTES
    await loader.load("a", embeddings[1].ref)
    assert source.num_gets == 4


async def test_embedding_larger_than_the_cache_is_not_kept() -> None:
    loader = _loader(None, max_bytes=ROW_BYTES - 1)

    rows = await loader.accept("a", _embedding(1))

    assert rows.shape == (ROWS, WIDTH)
    assert loader.cache_bytes == 0


async def test_inline_embedding_is_kept_for_later_requests() -> None:
    loader, embedding = _loader(None), _embedding(1)

    rows = await loader.accept("a", embedding)

    assert await loader.load("a", embedding.ref) is rows


async def test_rows_are_converted_to_the_type_of_the_model() -> None:
    loader = EmbeddingLoader(None, torch.bfloat16, 1 << 20)

    assert (await loader.accept("a", _embedding(1))).dtype is torch.bfloat16


@pytest.mark.parametrize("value", [np.nan, np.inf])
async def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await _loader(None).accept("a", _embedding(1, fill=value))

    assert refused.value.reason == "INVALID_EMBEDDING"
