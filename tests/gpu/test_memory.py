"""The KV cache takes what the GPU has, and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.generator.model.cache_sizes import CacheRequest, CacheTooSmallError
from chiasm.generator.model.load import load_model
from tests.fakes.checkpoints import make_qwen2_vl

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.generator.model.kv_cache import KVCacheLayout

pytestmark = pytest.mark.gpu

REQUEST = CacheRequest(16, None, None, None, max_sequences=1 << 30, chunk_tokens=256)


def load(path: Path, device: torch.device, request: CacheRequest) -> KVCacheLayout:
    return load_model(path, torch.float32, device, request).layout


def test_the_cache_takes_the_share_that_is_left(tmp_path: Path, device: torch.device) -> None:
    path = make_qwen2_vl(tmp_path)
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    share = (total_bytes - free_bytes) / total_bytes + (3 << 30) / total_bytes

    # A layout only: 16 tokens of 3 layers, 2 heads of 16 values, float32.
    layout = load(path, device, replace(REQUEST, device_share=share, max_sequences=10_000))

    assert 0 < layout.num_blocks * 16 * 3 * 2 * 2 * 16 * 4 < 3 << 30


def test_a_share_that_weights_and_others_take_is_refused(
    tmp_path: Path, device: torch.device
) -> None:
    with pytest.raises(CacheTooSmallError, match="nothing is left for the KV cache"):
        load(make_qwen2_vl(tmp_path), device, replace(REQUEST, device_share=0.001))
