"""How much of a device the KV cache takes if nobody says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from chiasm.generator.model.cache_sizes import CacheRequest, CacheTooSmallError
from chiasm.generator.model.memory_budget import (
    CPU_BUDGET_BYTES,
    DeviceMemory,
    count_step_bytes,
    decide_budget,
    read_device_memory,
)

GIB = 1 << 30
CONFIG = transformers.Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_attention_heads=28,
    num_key_value_heads=4,
)
REQUEST = CacheRequest(
    block_size=16,
    budget_bytes=None,
    num_blocks=None,
    max_model_len=None,
    max_sequences=64,
    chunk_tokens=2048,
    device_share=0.75,
)
DTYPE = torch.bfloat16


def test_what_is_asked_for_is_taken() -> None:
    request = replace(REQUEST, budget_bytes=7)

    for memory in (None, DeviceMemory(80 * GIB, 80 * GIB)):
        assert decide_budget(CONFIG, DTYPE, request, memory) == 7


def test_a_cpu_gives_a_fixed_amount() -> None:
    memory = read_device_memory(torch.device("cpu"))

    assert decide_budget(CONFIG, DTYPE, REQUEST, memory) == CPU_BUDGET_BYTES


def test_a_gpu_gives_its_share_without_what_is_taken_and_what_a_step_takes() -> None:
    memory = DeviceMemory(free_bytes=60 * GIB, total_bytes=80 * GIB)

    budget_bytes = decide_budget(CONFIG, DTYPE, REQUEST, memory)

    assert budget_bytes == 40 * GIB - count_step_bytes(CONFIG, DTYPE, REQUEST)


def test_a_gpu_that_is_full_is_refused() -> None:
    memory = DeviceMemory(free_bytes=20 * GIB, total_bytes=80 * GIB)

    with pytest.raises(CacheTooSmallError, match="61440 are taken by the weights"):
        decide_budget(CONFIG, DTYPE, REQUEST, memory)


def test_a_step_grows_with_its_tokens_and_the_rows_that_it_samples() -> None:
    few, base, many = (
        count_step_bytes(CONFIG, DTYPE, request)
        for request in (
            replace(REQUEST, chunk_tokens=16),
            REQUEST,
            replace(REQUEST, max_sequences=128),
        )
    )

    # A 7B model in bfloat16: gate and up projections and their product alone are 113 KiB a token.
    assert base - few > 2032 * 3 * 18_944 * 2
    # The logits of 64 more rows in float32, and their probabilities.
    assert many - base > 64 * 152_064 * 2 * 4
    assert base < 3 * GIB
