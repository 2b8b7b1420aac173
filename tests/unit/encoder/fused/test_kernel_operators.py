"""The operators of blocks by the compiled kernels against those by torch."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import silu

from chiasm.common.packed_linear import PackedLinear
from chiasm.encoder.fused.description import BlockDescription
from chiasm.encoder.fused.kernel_operators import KernelOperators
from chiasm.encoder.fused.rotary import make_rotation
from chiasm.encoder.fused.segments import Segments
from chiasm.encoder.fused.torch_operators import TorchOperators
from chiasm.kernels.cpu.native import find_kernels
from chiasm.kernels.cpu.tiled_linear import TiledLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.kernels.cpu.native import Level

# Differences of attended values, which are sums of about normal ones; bfloat16 weights are rounded.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Lengths of segments: one of all rows, windows, windows with rests, and frames that are longer
# than a block of query rows.
CUTS = {
    "one_row": [1],
    "all": [300],
    "windows": [64] * 5,
    "rests": [64, 32, 64, 32, 16, 8, 1],
    "frames": [210, 210],
    "with_empty": [0, 20, 0, 0, 70, 0],
}


def make_segments(lengths: Sequence[int]) -> Segments:
    return Segments(torch.tensor([0, *itertools.accumulate(lengths)]))


def make_heads(num_rows: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(head_dim)
    return torch.randn(num_rows, 3, 4, head_dim, generator=generator).to(dtype)


def make_operators(level: Level, head_dim: int, dtype: torch.dtype) -> KernelOperators:
    kernels = find_kernels(level)
    assert kernels is not None
    description = BlockDescription(4, head_dim, "gelu", ("", ""), ("",), "", ("",), "")
    return KernelOperators(kernels, description, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80])
@pytest.mark.parametrize("lengths", CUTS.values(), ids=CUTS)
def test_segments_attend_as_by_torch(
    level: Level, dtype: torch.dtype, head_dim: int, lengths: list[int]
) -> None:
    operators, segments = make_operators(level, head_dim, dtype), make_segments(lengths)
    heads = make_heads(sum(lengths), head_dim, dtype)

    attended = operators.attend(heads, segments)

    expected = TorchOperators().attend(heads, segments)
    assert attended.is_contiguous()
    torch.testing.assert_close(attended, expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_segment_is_the_same_to_the_bit_beside_any_others(level: Level, dtype: torch.dtype) -> None:
    lengths = [64, 30, 100, 7]
    operators, heads = make_operators(level, 80, dtype), make_heads(sum(lengths), 80, dtype)

    together = operators.attend(heads, make_segments(lengths))

    parts = torch.split_with_sizes(heads, lengths)
    alone = [operators.attend(part, make_segments([len(part)])) for part in parts]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_segment_reads_no_keys_of_others(level: Level, dtype: torch.dtype) -> None:
    lengths = [64, 30, 100, 7]
    operators, heads = make_operators(level, 80, dtype), make_heads(sum(lengths), 80, dtype)
    whole = operators.attend(heads, make_segments(lengths))
    heads[64:94] = float("nan")

    attended = operators.attend(heads, make_segments(lengths))

    assert attended[64:94].isnan().all()
    assert torch.equal(attended[:64], whole[:64])
    assert torch.equal(attended[94:], whole[94:])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_queries_and_keys_turn_as_by_torch(level: Level, dtype: torch.dtype) -> None:
    operators, heads = make_operators(level, 72, dtype), make_heads(50, 72, dtype)
    angles = torch.randn(50, 36, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    rotation = make_rotation(angles.cos(), angles.sin())
    expected = heads.clone()
    TorchOperators().rotate(expected, rotation)

    operators.rotate(heads, rotation)

    torch.testing.assert_close(heads, expected, rtol=TOLERANCES[dtype] / 2, atol=1e-6)
    assert int((heads != expected).sum()) <= (heads.numel() if dtype is torch.float32 else 4)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_tiles_multiply_bfloat16_where_the_processor_has_them(
    level: Level, dtype: torch.dtype
) -> None:
    operators = make_operators(level, 16, dtype)
    weight, rows = torch.randn(12, 8).to(dtype), torch.randn(3, 8).to(dtype)
    others = torch.randn(3, 12).to(dtype)

    layer = operators.linear(weight, None)

    is_tiled = level == "amx" and dtype is torch.bfloat16
    assert type(layer) is (TiledLinear if is_tiled else PackedLinear)
    expected = others.float() + rows.float() @ weight.float().T
    torch.testing.assert_close(layer.add(rows, others).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_only_tiles_gate_and_only_with_functions_that_they_know(
    level: Level, dtype: torch.dtype
) -> None:
    operators = make_operators(level, 16, dtype)
    weight, rows = torch.randn(24, 8).to(dtype), torch.randn(3, 8).to(dtype)

    make_gated = operators.gated("silu")

    assert operators.gated("gelu") is None
    if level != "amx" or dtype is not torch.bfloat16:
        assert make_gated is None
        return
    assert make_gated is not None
    gate, factor = (rows.float() @ weight.float().T).chunk(2, dim=1)
    gated = make_gated(weight, None)(rows).float()
    torch.testing.assert_close(gated, silu(gate) * factor, rtol=0.02, atol=0.05)
