"""Who multiplies by the weights of the fused decoder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from chiasm.common.families import PositionScheme
from chiasm.common.gate_after import GateAfter
from chiasm.common.packed_linear import PackedLinear
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.model.fused.description import UnsupportedDecoderError
from chiasm.generator.model.fused.linear_maker import LinearMaker
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.model_spec import ModelSpec
from chiasm.kernels.cpu.native import LEVELS, CpuKernels, KernelsUnavailableError
from chiasm.kernels.cpu.quantized_layer import QuantizedLinear
from chiasm.kernels.cpu.tiled_linear import TiledLinear

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chiasm.generator.model.fused.layer_operators import Gate
    from chiasm.kernels.cpu.native import Level
    from chiasm.kernels.cpu.quantized_layer import Quantization

SPEC = ModelSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_size=8,
    vocab_size=16,
    max_positions=64,
    eos_token_ids=frozenset(),
    positions=PositionScheme.LINEAR,
    layer_windows=(0,),
)


def _make_cache(
    kernels: CpuKernels | None, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> KVCache:
    return KVCache(SPEC, KVCacheLayout((GroupSize(4),), 4), dtype, torch.device(device), kernels)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_multiply_bfloat16_where_the_processor_has_them(
    kernel_library: Path, level: Level, dtype: torch.dtype
) -> None:
    try:
        kernels = CpuKernels(kernel_library, level)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    weight = torch.randn(24, 8).to(dtype)

    linear = LinearMaker(_make_cache(kernels, dtype), "none").linear(weight, None, 16)

    is_tiled = level == "amx" and dtype is torch.bfloat16
    assert type(linear) is (TiledLinear if is_tiled else PackedLinear)
    rows = torch.randn(3, 16).to(dtype)[:, ::2]
    assert torch.allclose(linear(rows).float(), (rows @ weight.T).float(), atol=0.05, rtol=0.02)
    assert linear.num_inputs == 8
    assert linear.num_bytes >= weight.nbytes


def test_without_kernels_onednn_multiplies() -> None:
    linear = LinearMaker(_make_cache(None), "none").linear(torch.randn(24, 8).bfloat16(), None)

    assert type(linear) is PackedLinear


def test_integers_multiply_if_they_are_asked_for(kernel_library: Path) -> None:
    cache = _make_cache(CpuKernels(kernel_library))

    linear = LinearMaker(cache, "w8a8").linear(torch.randn(24, 8).bfloat16(), None)

    assert type(linear) is QuantizedLinear


def test_integers_on_another_device_are_refused() -> None:
    with pytest.raises(UnsupportedDecoderError, match="w8a8 needs a CPU"):
        LinearMaker(_make_cache(None, device="meta"), "w8a8")


@pytest.mark.parametrize(
    ("quantization", "activation", "is_fused"),
    [
        ("none", "silu", False),
        ("w8a8", "silu", True),
        ("w8a8", "gelu_pytorch_tanh", True),
        ("w8a8", "relu", False),
    ],
)
def test_products_gate_themselves_where_a_kernel_can(
    kernel_library: Path, quantization: Quantization, activation: str, is_fused: bool
) -> None:
    cache = _make_cache(CpuKernels(kernel_library, "plain"), torch.float32)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": silu,
        "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
        "relu": relu,
    }
    widths = []

    def make_gate(width: int) -> Gate:
        widths.append(width)
        return lambda rows: functions[activation](rows[:, :width]) * rows[:, width:]

    weight, rows = torch.randn(24, 8), torch.randn(3, 8)
    maker = LinearMaker(cache, quantization)
    linear = maker.gated(weight, None, activation, make_gate)

    assert isinstance(linear, GateAfter) is not is_fused
    assert widths == ([] if is_fused else [12])
    assert linear.num_bytes >= 24 * 8
    expected = make_gate(12)(maker.linear(weight, None)(rows))
    assert torch.allclose(linear(rows), expected, atol=1e-5)
