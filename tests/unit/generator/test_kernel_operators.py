"""What lies between the products of a layer: our kernels against torch, for each kind of model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.families import PositionScheme
from chiasm.common.rms_norm import RMSNorm
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.model.fused.description import DecoderDescription, LayerDescription
from chiasm.generator.model.fused.gpu_operators import GpuOperators
from chiasm.generator.model.fused.kernel_operators import KernelOperators
from chiasm.generator.model.fused.rotary import make_rotation
from chiasm.generator.model.fused.torch_operators import TorchOperators
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.model_spec import ModelSpec
from chiasm.kernels.cpu.native import CpuKernels

if TYPE_CHECKING:
    from chiasm.generator.model.fused.layer_operators import LayerOperators
    from chiasm.kernels.triton_kernels import TritonKernels

HEAD_DIM = 8
WIDTH = 48
NUM_TOKENS = 7
LAYER = 1
DESCRIPTION = DecoderDescription(
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=HEAD_DIM,
    layers=(LayerDescription(), LayerDescription()),
    norm_epsilon=1e-6,
    activation="silu",
    attention_scale=1.0,
)
# Sums of float32 in two orders, rounded to 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", params=["compiled", "triton"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels | TritonKernels:
    if request.param == "compiled":
        return CpuKernels(request.getfixturevalue("kernel_library"))
    if request.getfixturevalue("triton_device") != "cpu":
        pytest.skip("tests of the GPU compare there")
    from chiasm.kernels.triton_kernels import TritonKernels

    return TritonKernels()


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request: pytest.FixtureRequest, kernels: CpuKernels | TritonKernels) -> torch.dtype:
    chosen: torch.dtype = request.param
    if chosen is torch.bfloat16 and not isinstance(kernels, CpuKernels):
        pytest.skip("the interpreter truncates to bfloat16")
    return chosen


def _random(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def _make_cache(dtype: torch.dtype) -> KVCache:
    spec = ModelSpec(
        num_layers=len(DESCRIPTION.layers),
        num_kv_heads=DESCRIPTION.num_kv_heads,
        head_dim=HEAD_DIM,
        hidden_size=WIDTH,
        vocab_size=16,
        max_positions=64,
        eos_token_ids=frozenset(),
        positions=PositionScheme.LINEAR,
        layer_windows=(0, 0),
    )
    cache = KVCache(spec, KVCacheLayout((GroupSize(4),), 4), dtype, torch.device("cpu"))
    for tensor in (*cache.keys, *cache.values):
        tensor.zero_()
    return cache


def _make_operators(
    kernels: CpuKernels | TritonKernels, description: DecoderDescription, cache: KVCache
) -> LayerOperators:
    if isinstance(kernels, CpuKernels):
        return KernelOperators(description, cache, kernels)
    return GpuOperators(description, cache, kernels)


def _make_both(
    kernels: CpuKernels | TritonKernels,
    dtype: torch.dtype,
    description: DecoderDescription = DESCRIPTION,
) -> tuple[LayerOperators, LayerOperators]:
    return (
        _make_operators(kernels, description, _make_cache(dtype)),
        TorchOperators(description, _make_cache(dtype)),
    )


def _assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert output.dtype == expected.dtype
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("has_addend", [False, True])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_norms_of_sums_are_equal(
    kernels: CpuKernels | TritonKernels,
    dtype: torch.dtype,
    scale: float,
    has_addend: bool,
    weight_dtype: torch.dtype | None,
) -> None:
    norm = RMSNorm(_random(0, WIDTH, dtype=weight_dtype or dtype), 1e-6)
    addend = _random(1, NUM_TOKENS, WIDTH, dtype=dtype) if has_addend else None
    results = []
    for operators in _make_both(kernels, dtype):
        hidden = _random(2, NUM_TOKENS, WIDTH, dtype=dtype)
        results.append((operators.add_norm(norm, scale)(hidden, addend), hidden))

    (normed, hidden), (expected_normed, expected_hidden) = results
    _assert_close(normed, expected_normed)
    assert torch.equal(hidden, expected_hidden)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
def test_gates_are_equal_with_or_without_a_kernel(
    kernels: CpuKernels | TritonKernels, dtype: torch.dtype, activation: str
) -> None:
    description = replace(DESCRIPTION, activation=activation)

    gated, expected = (
        operators.gate(WIDTH)(_random(3, NUM_TOKENS, 2 * WIDTH, dtype=dtype))
        for operators in _make_both(kernels, dtype, description)
    )

    _assert_close(gated, expected)


@pytest.mark.parametrize("rotary_dim", [4, HEAD_DIM])
@pytest.mark.parametrize("has_norm", [False, True])
def test_heads_are_placed_equally(
    kernels: CpuKernels | TritonKernels, dtype: torch.dtype, rotary_dim: int, has_norm: bool
) -> None:
    angles = _random(4, 1, NUM_TOKENS, rotary_dim // 2, dtype=torch.float32).repeat(1, 1, 2)
    rotation = make_rotation(angles.cos().to(dtype), angles.sin().to(dtype))
    norm = RMSNorm(_random(5, 6, HEAD_DIM, dtype=dtype), 1e-6) if has_norm else None
    slots = torch.tensor([14, 3, 4, 5, 9, 1, 0])
    results = []
    caches = (_make_cache(dtype), _make_cache(dtype))
    both: tuple[LayerOperators, LayerOperators] = (
        _make_operators(kernels, DESCRIPTION, caches[0]),
        TorchOperators(DESCRIPTION, caches[1]),
    )
    for operators, cache in zip(both, caches, strict=True):
        qkv = _random(6, NUM_TOKENS, 8 * HEAD_DIM, dtype=dtype)
        heads = operators.place(LAYER, norm)(qkv, rotation, slots)
        results.append((*heads, cache.keys[LAYER], cache.values[LAYER]))

    for placed, expected in zip(*results, strict=True):
        _assert_close(placed, expected)
    for cache in caches:
        assert cache.keys[LAYER][slots].all()
        assert not cache.keys[0].any()
