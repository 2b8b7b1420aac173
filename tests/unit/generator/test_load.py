"""Sizes of the KV cache and facts about the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.model.cache_sizes import CacheRequest, CacheTooSmallError, decide_sizes
from tests.fakes.generator_engine import BYTE_SPEC

TOKEN_BYTES = 2 * 4  # key and value of one layer, one head, width 1, float32
BUDGET_BYTES = 1 << 30
REQUEST = CacheRequest(
    block_size=16,
    budget_bytes=None,
    num_blocks=None,
    max_model_len=None,
    max_sequences=4,
    chunk_tokens=64,
)


def test_no_more_blocks_are_reserved_than_sequences_can_use() -> None:
    layout, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, REQUEST, BUDGET_BYTES)

    assert max_model_len == BYTE_SPEC.max_positions == 512
    assert layout.num_blocks == 4 * 512 // 16


def test_budget_bounds_the_blocks_and_the_context() -> None:
    layout, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, REQUEST, 10 * 16 * TOKEN_BYTES)

    assert (layout.num_blocks, max_model_len) == (10, 160)


def test_number_of_blocks_overrides_the_budget() -> None:
    request = replace(REQUEST, num_blocks=3)

    layout, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, request, BUDGET_BYTES)

    assert (layout.num_blocks, max_model_len) == (3, 48)


def test_asked_context_bounds_requests() -> None:
    request = replace(REQUEST, max_model_len=100)

    _, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, request, BUDGET_BYTES)

    assert max_model_len == 100


@pytest.mark.parametrize(
    ("wrong", "budget_bytes"),
    [
        (replace(REQUEST, max_model_len=513), BUDGET_BYTES),
        (replace(REQUEST, max_model_len=100, num_blocks=6), BUDGET_BYTES),
        (REQUEST, 1),
    ],
    ids=["model", "blocks", "bytes"],
)
def test_context_that_model_or_cache_cannot_hold_is_refused(
    wrong: CacheRequest, budget_bytes: int
) -> None:
    with pytest.raises(CacheTooSmallError, match="is asked for"):
        decide_sizes(BYTE_SPEC, torch.float32, wrong, budget_bytes)


def test_refusal_says_why_the_model_takes_less_than_it_was_trained_for() -> None:
    spec = replace(BYTE_SPEC, positions_bound="it was trained for 4096, but")
    request = replace(REQUEST, max_model_len=513)

    with pytest.raises(CacheTooSmallError, match=r"takes 512 \(it was trained for 4096, but\) and"):
        decide_sizes(spec, torch.float32, request, BUDGET_BYTES)


WINDOWED = replace(BYTE_SPEC, num_layers=4, layer_windows=(0, 32, 32, 0))
# Of window and chunk, which begin and end within a block: (32 + 64) / 16 + 1.
WINDOW_BLOCKS = 7


def test_layers_with_a_window_get_the_blocks_that_it_takes() -> None:
    layout, max_model_len = decide_sizes(WINDOWED, torch.float32, REQUEST, BUDGET_BYTES)

    assert layout.sizes == (GroupSize(4 * 512 // 16), GroupSize(4 * WINDOW_BLOCKS, 32))
    assert max_model_len == 512


def test_budget_is_shared_out_as_one_sequence_needs_it() -> None:
    # Two layers each; for two and a half sequences of 512 tokens.
    one = 2 * 16 * TOKEN_BYTES * (512 // 16 + WINDOW_BLOCKS)

    layout, _ = decide_sizes(WINDOWED, torch.float32, REQUEST, one * 5 // 2)

    assert layout.sizes == (GroupSize(80), GroupSize(17, 32))


def test_budget_below_one_sequence_bounds_the_context() -> None:
    budget_bytes = 10 * 4 * 16 * TOKEN_BYTES

    layout, max_model_len = decide_sizes(WINDOWED, torch.float32, REQUEST, budget_bytes)

    assert layout.sizes == (GroupSize(10), GroupSize(10, 32))
    assert max_model_len == 160


def test_model_of_windows_alone_holds_any_context() -> None:
    spec = replace(BYTE_SPEC, layer_windows=(32,))
    enough, too_few = (replace(REQUEST, num_blocks=n) for n in (WINDOW_BLOCKS, WINDOW_BLOCKS - 1))

    assert decide_sizes(spec, torch.float32, enough, BUDGET_BYTES)[1] == 512
    assert decide_sizes(spec, torch.float32, too_few, BUDGET_BYTES)[1] == (WINDOW_BLOCKS - 1) * 16


@pytest.mark.parametrize("num_blocks", range(7, 30))
def test_context_of_a_windowed_model_leaves_room_for_a_picture_that_is_not_cut(
    num_blocks: int,
) -> None:
    spec = replace(BYTE_SPEC, layer_windows=(24,), group_tokens=16)
    request = replace(REQUEST, block_size=4, chunk_tokens=8, num_blocks=num_blocks)

    layout, max_model_len = decide_sizes(spec, torch.float32, request, BUDGET_BYTES)

    blocks = BlockManager(layout.sizes, layout.block_size)
    assert blocks.can_hold(max_model_len, chunk_tokens=16)
