"""Triton's kernels on the device, with the sizes of real models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import gelu, silu

from chiasm.common.rms_norm import RMSNorm
from chiasm.generator.model.find_cache_kernels import find_cache_kernels
from chiasm.generator.model.fused.rotary import make_rotation, rotate
from chiasm.kernels.cache_kernels import DecodeRule, PrefillRule
from tests.fakes import rounding
from tests.fakes.attention_cases import Chunk, make_decode_case, make_prefill_case
from tests.fakes.rounding import DTYPE_PAIRS, random_rows

if TYPE_CHECKING:
    from chiasm.kernels.triton_kernels import TritonKernels

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Weights are rounded to the dtype of the values.
TOLERANCES = {
    torch.float32: (2e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1e-2, 1e-2),
}
# Query heads, key heads and their width, with a window and a soft cap.
SHAPES = [
    ((28, 4, 128), 0, 0.0),
    ((32, 8, 128), 1024, 0.0),
    ((8, 4, 256), 100, 50.0),
    ((32, 32, 96), 0, 30.0),
    ((71, 1, 64), 0, 0.0),
    ((4, 4, 80), 2047, 0.0),
]


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from chiasm.kernels.triton_kernels import TritonKernels

    kernels = TritonKernels()
    kernels.check(torch.device("cuda"))
    return kernels


def test_a_cache_on_the_device_is_read_by_triton(kernels: TritonKernels) -> None:
    found = find_cache_kernels(torch.device("cuda"), torch.bfloat16, "auto")

    assert isinstance(found, type(kernels))


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[output.dtype]
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "window", "softcap"), SHAPES, ids=str)
def test_decode_is_exact(
    kernels: TritonKernels,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    window: int,
    softcap: float,
) -> None:
    case = make_decode_case([700, 1, 4096, 17, 2049], heads, dtype=dtype).to("cuda")
    rule = DecodeRule(16, heads[2] ** -0.5, window, softcap)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


@pytest.mark.parametrize(
    ("dtype", "block_size"), [(torch.bfloat16, 64), (torch.float16, 5), (torch.float32, 1)], ids=str
)
@pytest.mark.parametrize("num_sequences", [1, 16, 64])
def test_batches_of_any_size_decode_exactly(
    kernels: TritonKernels, dtype: torch.dtype, num_sequences: int, block_size: int
) -> None:
    lengths = [1 + 41 * index for index in range(num_sequences)]
    case = make_decode_case(lengths, (8, 2, 128), block_size, dtype).to("cuda")
    rule = DecodeRule(block_size, 0.1)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "window", "softcap"), SHAPES, ids=str)
def test_prefill_is_exact(
    kernels: TritonKernels,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    window: int,
    softcap: float,
) -> None:
    bounds = [(0, 700), (1500, 1501), (900, 1412), (0, 33), (64, 300)]
    chunks = [Chunk(start, end, window) for start, end in bounds]
    case = make_prefill_case(chunks, heads, dtype=dtype)
    # An image of the first prompt attends both ways.
    case.seen[100:356, 1] = 356
    case = case.to("cuda")
    rule = PrefillRule(16, heads[2] ** -0.5, softcap)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


def test_prefill_of_many_prompts_is_exact(kernels: TritonKernels) -> None:
    chunks = [Chunk(0, 1 + 7 * index) for index in range(100)]
    case = make_prefill_case(chunks, (16, 8, 64), dtype=torch.float16).to("cuda")
    rule = PrefillRule(16, 0.125)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


def test_rows_outside_the_chunks_are_left_alone(kernels: TritonKernels) -> None:
    case = make_prefill_case([Chunk(0, 300), Chunk(0, 200)], dtype=torch.bfloat16).to("cuda")
    rule = PrefillRule(16, 0.125)

    output = case.run(kernels, rule, slice(1, 2))

    assert output[:300].isnan().all()
    assert torch.equal(output[300:], case.run(kernels, rule)[300:])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_wait_for_nothing(kernels: TritonKernels) -> None:
    decode = make_decode_case([700, 4096], (8, 2, 128), dtype=torch.bfloat16).to("cuda")
    prefill = make_prefill_case([Chunk(0, 300)], dtype=torch.bfloat16).to("cuda")
    expected = (
        decode.run(kernels, DecodeRule(16, 0.1)),
        prefill.run(kernels, PrefillRule(16, 0.1)),
    )

    try:
        torch.cuda.set_sync_debug_mode("error")
        again = (
            decode.run(kernels, DecodeRule(16, 0.1)),
            prefill.run(kernels, PrefillRule(16, 0.1)),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other)


def test_decode_is_captured_as_a_graph_and_follows_its_contexts(kernels: TritonKernels) -> None:
    rule = DecodeRule(16, 0.1)
    case = make_decode_case([700, 4096, 30], (8, 2, 128), dtype=torch.bfloat16).to("cuda")
    case.run(kernels, rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = case.run(kernels, rule)

    for lengths in ([700, 4096, 30], [1, 2000, 500]):
        case.lengths.copy_(torch.tensor(lengths))
        # What no sequence owns is NaN: the third has a table of its own, but only 30 positions.
        case.lengths.clamp_(max=torch.tensor([700, 4096, 30], device="cuda"))
        graph.replay()
        assert_close(output, case.attend_exactly(rule))


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1, 3584), (2048, 1536), (7, 8192)], ids=str)
def test_sums_and_norms_equal_torch(
    kernels: TritonKernels, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int]
) -> None:
    weight = random_rows(1, shape[1], dtype=dtypes[1]).cuda()
    hidden, addend = (random_rows(seed, *shape, dtype=dtypes[0]).cuda() for seed in (2, 3))
    total = hidden + addend

    normed = kernels.add_rms_norm(hidden, addend, weight, 1e-6, 1.0)

    assert torch.equal(hidden, total)
    rounding.assert_close(normed, RMSNorm(weight, 1e-6)(total))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("shape", [(1, 18_944), (2048, 8_960)], ids=str)
def test_gates_equal_torch(
    kernels: TritonKernels, dtype: torch.dtype, activation: str, shape: tuple[int, int]
) -> None:
    gate_up = random_rows(1, shape[0], 2 * shape[1], dtype=dtype).cuda()
    gates, ups = gate_up.chunk(2, dim=-1)
    gates = gates.double()
    activated = silu(gates) if activation == "silu" else gelu(gates, approximate="tanh")

    rounding.assert_close(kernels.gate(gate_up, activation), activated.to(dtype) * ups)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2048])
def test_heads_are_placed_as_torch_places_them(
    kernels: TritonKernels,
    dtypes: tuple[torch.dtype, torch.dtype],
    has_norm: bool,
    num_tokens: int,
) -> None:
    num_q_heads, num_kv_heads, head_dim, rotary_dim = 28, 4, 128, 96
    qkv = random_rows(1, num_tokens, 36 * head_dim, dtype=dtypes[0]).cuda()
    angles = random_rows(2, 1, num_tokens, rotary_dim // 2, dtype=torch.float32).repeat(1, 1, 2)
    rotation = make_rotation(angles.cos().to(dtypes[0]).cuda(), angles.sin().to(dtypes[0]).cuda())
    weight = random_rows(3, 32, head_dim, dtype=dtypes[1]).cuda()
    heads = qkv.view(num_tokens, 36, head_dim)
    turned = heads[:, :32]
    expected = rotate(RMSNorm(weight, 1e-6)(turned) if has_norm else turned, rotation)
    cached = tuple(
        torch.zeros(4096, num_kv_heads, head_dim, dtype=dtypes[0], device="cuda") for _ in range(2)
    )
    slots = torch.randperm(4096)[:num_tokens].cuda()
    norm = (weight, 1e-6) if has_norm else None

    tables = (rotation.cos, rotation.sin)
    placed = kernels.rope_store(qkv, tables, slots, (cached[0], cached[1]), norm)

    rounding.assert_close(placed, expected, float(expected.abs().max()))
    assert torch.equal(cached[0][slots], placed[:, num_q_heads:])
    assert torch.equal(cached[1][slots], heads[:, 32:])
