"""Attention over the paged cache against a plain one that sees each sequence alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.families import PositionScheme
from chiasm.common.media import MediaSpan
from chiasm.generator.engine.block_group import NO_BLOCK, GroupSize
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduled_step import ScheduledSequence
from chiasm.generator.engine.sequence import Sequence
from chiasm.generator.model.attention import AttentionContext, paged_attention
from chiasm.generator.model.attention_plan import CacheShape
from chiasm.generator.model.forward_batch import build_forward_batch
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.model_spec import ModelSpec
from chiasm.kernels.cpu.native import CpuKernels
from tests.fakes.embeddings import make_layout, make_ref
from tests.fakes.generator_engine import make_prompt, make_sequence

if TYPE_CHECKING:
    from chiasm.kernels.cache_kernels import CacheKernels

HEAD_DIM = 8
NUM_Q_HEADS = 4
BLOCK_SIZE = 4
CPU = torch.device("cpu")
SHAPE = CacheShape(BLOCK_SIZE, (0,), CPU)


@dataclass(frozen=True)
class _Rule:
    window: int | None = None
    softcap: float | None = None


class _Layer(torch.nn.Module):
    layer_idx = 0


def _spec(num_kv_heads: int, window: int = 0) -> ModelSpec:
    return ModelSpec(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        hidden_size=HEAD_DIM,
        vocab_size=16,
        max_positions=64,
        eos_token_ids=frozenset(),
        positions=PositionScheme.LINEAR,
        layer_windows=(window,),
    )


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule
) -> torch.Tensor:
    """Attend with the last queries of one sequence; all [tokens, heads, head_dim]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    output = torch.empty_like(query)
    for row in range(len(query)):
        position = len(key) - len(query) + row
        first = max(0, position + 1 - rule.window) if rule.window else 0
        scores = torch.einsum("hd,thd->ht", query[row], key[first : position + 1])
        scores = scores / math.sqrt(HEAD_DIM)
        if rule.softcap:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        output[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), value[first : position + 1])
    return output


def _place(seq_id: int, num_tokens: int, free: list[int]) -> Sequence:
    # All but the first token are output, so that the sequence may decode anywhere behind it.
    sequence = make_sequence(seq_id, [1])
    sequence.token_ids.extend([1] * (num_tokens - 1))
    sequence.tables[0].blocks.extend(free.pop() for _ in range(-(-num_tokens // BLOCK_SIZE)))
    return sequence


def _drop_unseen(sequence: Sequence, start: int, window: int) -> None:
    """Take away the blocks that no token from ``start`` on sees."""
    blocks = sequence.tables[0].blocks
    for index in range(max(0, start - window + 1) // BLOCK_SIZE):
        blocks[index] = NO_BLOCK


@pytest.fixture(scope="module", params=["torch", "compiled", "triton"])
def kernels(request: pytest.FixtureRequest) -> CacheKernels | None:
    if request.param == "torch":
        return None
    if request.param == "triton":
        if request.getfixturevalue("triton_device") != "cpu":
            pytest.skip("tests of the GPU attend there")
        from chiasm.kernels.triton_kernels import TritonKernels

        return TritonKernels()
    return CpuKernels(request.getfixturevalue("kernel_library"))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("keeps_window", [False, True])
@pytest.mark.parametrize(
    "rule", [_Rule(), _Rule(window=3), _Rule(softcap=2.0), _Rule(window=5, softcap=1.5)]
)
def test_packed_batch_equals_sequences_alone(
    num_kv_heads: int, rule: _Rule, keeps_window: bool, kernels: CacheKernels | None
) -> None:
    kept = (rule.window or 0) if keeps_window else 0
    generator = torch.Generator().manual_seed(0)
    free = torch.randperm(60, generator=generator).tolist()
    cache = KVCache(
        _spec(num_kv_heads, kept),
        KVCacheLayout((GroupSize(60, kept),), BLOCK_SIZE),
        torch.float32,
        CPU,
        kernels,
    )
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    # Contexts of sequences that decode, then lengths of prompts that begin.
    items = [(length, length - 1) for length in (9, 2, 30, 17)]
    items += [(length, 0) for length in (7, 1, 13)]
    # Chunks that go on: length of the context with the chunk, and where the chunk begins.
    items += [(14, 5), (9, 8), (25, 4), (12, 10)]
    keys = [torch.randn(n, num_kv_heads, HEAD_DIM, generator=generator) for n, _ in items]
    values = [torch.randn(n, num_kv_heads, HEAD_DIM, generator=generator) for n, _ in items]
    queries = [
        torch.randn(n - start, NUM_Q_HEADS, HEAD_DIM, generator=generator) for n, start in items
    ]
    scheduled = []
    for index, (length, start) in enumerate(items):
        sequence = _place(index, length, free)
        slots = torch.tensor(
            [
                sequence.tables[0].blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
                for p in range(start)
            ]
        ).long()
        cache.store(0, slots, keys[index][:start], values[index][:start])
        if kept:
            _drop_unseen(sequence, start, kept)
        scheduled.append(ScheduledSequence(sequence, start, length - start))
    shape = CacheShape(BLOCK_SIZE, (kept,), CPU, gathers=kernels is None)
    batch = build_forward_batch(scheduled, shape)
    order = [item.sequence.seq_id for item in batch.sequences]

    def pack(tensors: list[torch.Tensor], whole: bool) -> torch.Tensor:
        parts = [tensors[i] if whole else tensors[i][items[i][1] :] for i in order]
        return torch.cat(parts).transpose(0, 1)[None]

    output, _ = paged_attention(
        _Layer(),
        pack(queries, whole=True),
        pack(keys, whole=False),
        pack(values, whole=False),
        None,
        scaling=1 / math.sqrt(HEAD_DIM),
        paged=AttentionContext(batch, cache),
        sliding_window=rule.window,
        softcap=rule.softcap,
    )

    expected = torch.cat([_reference(queries[i], keys[i], values[i], rule) for i in order])
    torch.testing.assert_close(output[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.parametrize("window", [0, 2, 6])
def test_rows_that_attend_both_ways_see_one_another(
    start: int, window: int, kernels: CacheKernels | None
) -> None:
    length, offset, rows = 14, 4, range(5, 8)
    generator = torch.Generator().manual_seed(1)
    ref = make_ref(num_rows=3)
    layout = dataclasses.replace(make_layout(ref), attends_both_ways=True)
    prompt = make_prompt([1] * length, (MediaSpan(offset, ref, layout, is_ready=True),))
    sequence = Sequence(1, prompt, SamplingParams(4))
    sequence.embeddings[0] = torch.zeros(3, HEAD_DIM)
    sequence.tables[0].blocks.extend([3, 1, 0, 2])
    layout_of_cache = KVCacheLayout((GroupSize(4),), BLOCK_SIZE)
    cache = KVCache(_spec(2), layout_of_cache, torch.float32, CPU, kernels)
    query = torch.randn(length, NUM_Q_HEADS, HEAD_DIM, generator=generator)
    key, value = (torch.randn(length, 2, HEAD_DIM, generator=generator) for _ in range(2))
    slots = torch.tensor(
        [sequence.tables[0].blocks[p // 4] * 4 + p % 4 for p in range(start)]
    ).long()
    cache.store(0, slots, key[:start], value[:start])
    chunk = ScheduledSequence(sequence, start, length - start)
    batch = build_forward_batch([chunk], SHAPE)

    new_query, new_key, new_value = (
        tensor[start:].transpose(0, 1)[None] for tensor in (query, key, value)
    )
    output, _ = paged_attention(
        _Layer(),
        new_query,
        new_key,
        new_value,
        None,
        scaling=1 / math.sqrt(HEAD_DIM),
        paged=AttentionContext(batch, cache),
        sliding_window=window or None,
    )

    for row in range(start, length):
        sees = [
            (p <= row or (row in rows and p in rows)) and (not window or p > row - window)
            for p in range(length)
        ]
        heads = range(NUM_Q_HEADS)
        scores = torch.stack([key[sees, h // 2] @ query[row, h] for h in heads])
        weights = (scores / math.sqrt(HEAD_DIM)).softmax(-1)
        expected = torch.stack([weights[h] @ value[sees, h // 2] for h in heads])
        torch.testing.assert_close(output[0, row - start], expected, rtol=1e-5, atol=1e-5)


def test_sequences_of_similar_length_share_one_gather() -> None:
    free = list(range(100_000))
    lengths = [600, 300, 601, 200, 5000, 900]
    scheduled = [
        ScheduledSequence(_place(index, length, free), length - 1, 1)
        for index, length in enumerate(lengths)
    ]

    batch = build_forward_batch(scheduled, SHAPE)

    groups = [group.context_lengths.tolist() for group in batch.decode_groups]
    assert groups == [[200, 300], [600, 601, 900], [5000]]
    assert [group.rows for group in batch.decode_groups] == [slice(0, 2), slice(2, 5), slice(5, 6)]


def test_sequences_whose_contexts_are_read_in_place_stay_together() -> None:
    free = list(range(100_000))
    lengths = [600, 5000, 200]
    scheduled = [
        ScheduledSequence(_place(index, length, free), length - 1, 1)
        for index, length in enumerate(lengths)
    ]

    batch = build_forward_batch(scheduled, dataclasses.replace(SHAPE, gathers=False))

    (group,) = batch.decode_groups
    assert group.context_lengths.tolist() == [200, 600, 5000]


def test_what_kernels_read_travels_once_for_all_layers_of_a_window() -> None:
    free = list(range(100))
    chunks = [
        ScheduledSequence(_place(1, 6, free), 2, 4),
        ScheduledSequence(_place(2, 3, free), 0, 3),
    ]
    decode = ScheduledSequence(_place(3, 9, free), 8, 1)
    batch = build_forward_batch([*chunks, decode], SHAPE)

    bounds, tables, seen = batch.prefills.context(0, 0)
    windowed = batch.prefills.context(0, 2)

    assert bounds.tolist() == [[0, 4], [4, 3]]
    assert tables.shape == (2, 2)
    assert seen.tolist() == [[0, 3], [0, 4], [0, 5], [0, 6], [0, 1], [0, 2], [0, 3]]
    assert windowed[2].tolist() == [[1, 3], [2, 4], [3, 5], [4, 6], [0, 1], [0, 2], [1, 3]]
    assert batch.prefills.context(0, 0)[2] is seen
    assert batch.prefills.context(0, 2)[2] is windowed[2]
    (decodes,) = batch.decode_groups
    assert decodes.context(0)[0] is decodes.context(0)[0]
    assert decodes.context(0)[1].tolist() == [9]


@pytest.mark.parametrize("name", ["attention_mask", "s_aux"])
def test_what_is_not_supported_is_refused(name: str) -> None:
    tensor = torch.zeros(1, 1, 1, HEAD_DIM)
    arguments = {"attention_mask": None, name: tensor}

    with pytest.raises(ValueError, match="not supported"):
        paged_attention(
            _Layer(),
            tensor,
            tensor,
            tensor,
            scaling=1.0,
            paged=None,  # type: ignore[arg-type]  # refused before it is looked at
            **arguments,  # type: ignore[arg-type]  # by name on purpose
        )


def test_layer_that_sees_more_than_its_cache_keeps_is_refused() -> None:
    cache = KVCache(
        _spec(1, window=3), KVCacheLayout((GroupSize(4, 3),), BLOCK_SIZE), torch.float32, CPU
    )
    chunk = ScheduledSequence(_place(1, 4, list(range(4))), 0, 4)
    batch = build_forward_batch([chunk], CacheShape(BLOCK_SIZE, (3,), CPU))
    zeros = torch.zeros(1, 1, 4, HEAD_DIM)
    context = AttentionContext(batch, cache)

    with pytest.raises(ValueError, match="Layer 0 sees 0 positions; its cache keeps 3"):
        paged_attention(_Layer(), zeros, zeros, zeros, None, scaling=1.0, paged=context)
