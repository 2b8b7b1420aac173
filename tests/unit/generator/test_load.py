"""Sizes of the KV cache and facts about the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chiasm.generator.model.load import CacheRequest, CacheTooSmallError, decide_sizes
from tests.fakes.generator_engine import BYTE_SPEC

TOKEN_BYTES = 2 * 4  # key and value of one layer, one head, width 1, float32
REQUEST = CacheRequest(
    block_size=16, budget_bytes=1 << 30, num_blocks=None, max_model_len=None, max_sequences=4
)


def test_no_more_blocks_are_reserved_than_sequences_can_use() -> None:
    layout, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, REQUEST)

    assert max_model_len == BYTE_SPEC.max_positions == 512
    assert layout.num_blocks == 4 * 512 // 16


def test_budget_bounds_the_blocks_and_the_context() -> None:
    request = replace(REQUEST, budget_bytes=10 * 16 * TOKEN_BYTES)

    layout, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, request)

    assert (layout.num_blocks, max_model_len) == (10, 160)


def test_number_of_blocks_overrides_the_budget() -> None:
    layout, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, replace(REQUEST, num_blocks=3))

    assert (layout.num_blocks, layout.num_slots, max_model_len) == (3, 48, 48)


def test_asked_context_bounds_requests() -> None:
    _, max_model_len = decide_sizes(BYTE_SPEC, torch.float32, replace(REQUEST, max_model_len=100))

    assert max_model_len == 100


@pytest.mark.parametrize(
    "wrong",
    [{"max_model_len": 513}, {"max_model_len": 100, "num_blocks": 6}, {"budget_bytes": 1}],
    ids=str,
)
def test_context_that_model_or_cache_cannot_hold_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(CacheTooSmallError, match="is asked for"):
        decide_sizes(BYTE_SPEC, torch.float32, replace(REQUEST, **wrong))
