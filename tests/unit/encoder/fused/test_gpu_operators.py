"""The operators of blocks by Triton's kernels against those by torch, and whole towers by both."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.packed_linear import PackedLinear
from chiasm.common.rms_norm import RMSNorm
from chiasm.encoder.fused import fuse_tower
from chiasm.encoder.fused.description import BlockDescription
from chiasm.encoder.fused.feed_forward import FeedForward
from chiasm.encoder.fused.fuse_tower import TowerRequest
from chiasm.encoder.fused.norm import LayerNorm
from chiasm.encoder.fused.rotary import make_rotation
from chiasm.encoder.fused.segments import Segments
from chiasm.encoder.fused.torch_operators import TorchOperators
from chiasm.encoder.tower import Tower
from tests.fakes.rounding import random_rows
from tests.unit.encoder.fused.test_fused_tower import GRID_MAKERS, load, make_items, relative_error

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.encoder.fused.gpu_operators import GpuOperators
    from chiasm.kernels.triton_kernels import TritonKernels

NUM_HEADS = 4
HEAD_DIM = 16
TOLERANCE = 1e-5
CUTS = {"one": [5], "windows": [4, 4, 4], "rests": [7, 1, 4, 2], "with_empty": [0, 5, 0, 3]}


@pytest.fixture
def kernels(triton_device: str) -> TritonKernels:
    if triton_device != "cpu":
        pytest.skip("tests of the GPU compare towers there")
    from chiasm.kernels.triton_kernels import TritonKernels

    return TritonKernels()


@pytest.fixture
def operators(kernels: TritonKernels) -> GpuOperators:
    from chiasm.encoder.fused.gpu_operators import GpuOperators

    return GpuOperators(
        kernels, BlockDescription(NUM_HEADS, HEAD_DIM, "silu", ("", ""), ("",), "", ("",), "")
    )


def make_heads(num_rows: int) -> torch.Tensor:
    return random_rows(1, num_rows, 3, NUM_HEADS, HEAD_DIM, dtype=torch.float32)


@pytest.mark.parametrize("lengths", CUTS.values(), ids=CUTS)
def test_segments_attend_as_by_torch(operators: GpuOperators, lengths: list[int]) -> None:
    heads = make_heads(sum(lengths))
    segments = Segments(torch.tensor([0, *itertools.accumulate(lengths)]))

    attended = operators.attend(heads, segments)

    assert attended.is_contiguous()
    torch.testing.assert_close(
        attended, TorchOperators().attend(heads, segments), rtol=0, atol=TOLERANCE
    )


def test_queries_and_keys_turn_as_by_torch(operators: GpuOperators) -> None:
    heads = make_heads(5)
    angles = random_rows(2, 5, HEAD_DIM // 2, dtype=torch.float32).repeat(1, 2)
    rotation = make_rotation(angles.cos(), angles.sin())
    expected = heads.clone()
    TorchOperators().rotate(expected, rotation)

    operators.rotate(heads, rotation)

    torch.testing.assert_close(heads, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_norms_and_products_are_those_of_torch(operators: GpuOperators) -> None:
    rows = random_rows(3, 5, 24, dtype=torch.float32)
    weight, bias = random_rows(4, 24, dtype=torch.float32), random_rows(5, 24, dtype=torch.float32)
    matrix = random_rows(7, 16, 24, dtype=torch.float32)
    for norm in (RMSNorm(weight, 1e-6), LayerNorm(weight, bias, 1e-6)):
        before = rows.clone()
        torch.testing.assert_close(operators.norm(norm)(rows), norm(before), rtol=1e-5, atol=1e-5)
        assert torch.equal(rows, before)

    make_gated = operators.gated("silu")
    assert make_gated is not None
    assert operators.gated("quick_gelu") is None
    gated = make_gated(matrix, None)
    gates, factors = PackedLinear(matrix)(rows).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gates) * factors
    torch.testing.assert_close(gated(rows), expected, rtol=1e-5, atol=1e-4)
    assert gated.num_bytes == matrix.nbytes


@pytest.mark.parametrize("width", [8, 13])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_rows_are_filled_up_with_nothing(
    operators: GpuOperators, width: int, has_bias: bool
) -> None:
    description = BlockDescription(
        NUM_HEADS, HEAD_DIM, "silu", ("", ""), ("",), "", ("gate", "up"), "down"
    )
    made = []
    for chosen in (operators, TorchOperators()):
        torch.manual_seed(0)
        module = torch.nn.Module()
        for name in ("gate", "up"):
            module.add_module(name, torch.nn.Linear(24, width, has_bias))
        module.add_module("down", torch.nn.Linear(width, 24, has_bias))
        made.append(FeedForward(module, description, chosen))
    rows, others = (random_rows(seed, 5, 24, dtype=torch.float32) for seed in (3, 6))

    filled, plain = (one.add(rows, others.clone()) for one in made)

    torch.testing.assert_close(filled, plain, rtol=1e-5, atol=1e-5)
    num_values = 3 * 24 * 16 + has_bias * (2 * 16 + 24) if width > 8 else 0
    assert made[0].num_bytes == (4 * num_values or made[1].num_bytes)


@pytest.mark.parametrize("make", GRID_MAKERS.values(), ids=GRID_MAKERS)
def test_towers_give_what_transformers_computes(
    make: object, tmp_path: Path, kernels: TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(make)
    path = make(tmp_path)
    monkeypatch.setattr(fuse_tower, "find_kernels", lambda _: kernels)
    tower = Tower.load(path, torch.float32, torch.device("cpu"), TowerRequest("fused", "auto"))
    items = make_items(path, [(1, 4, 6), (1, 2, 2)])

    rows = torch.cat(tower.encode(items))

    expected = torch.cat(load(path, "transformers").encode(items))
    assert relative_error(rows, expected) <= TOLERANCE
    assert tower.kind == "fused_kernels"
