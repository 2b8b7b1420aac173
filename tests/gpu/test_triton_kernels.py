"""Triton's kernels on the device, with the sizes of real models."""

from __future__ import annotations

import pytest
import torch

from chiasm.kernels.cache_kernels import CacheKernels, DecodeRule, PrefillRule
from tests.fakes.attention_cases import Chunk, make_decode_case, make_prefill_case

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Weights are rounded to the dtype of the values.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
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
def kernels() -> CacheKernels:
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from chiasm.kernels.triton_kernels import TritonKernels

    kernels = TritonKernels()
    kernels.check(torch.device("cuda"))
    return kernels


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[output.dtype]
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "window", "softcap"), SHAPES, ids=str)
def test_decode_is_exact(
    kernels: CacheKernels,
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
    kernels: CacheKernels, dtype: torch.dtype, num_sequences: int, block_size: int
) -> None:
    lengths = [1 + 41 * index for index in range(num_sequences)]
    case = make_decode_case(lengths, (8, 2, 128), block_size, dtype).to("cuda")
    rule = DecodeRule(block_size, 0.1)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "window", "softcap"), SHAPES, ids=str)
def test_prefill_is_exact(
    kernels: CacheKernels,
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


def test_prefill_of_many_prompts_is_exact(kernels: CacheKernels) -> None:
    chunks = [Chunk(0, 1 + 7 * index) for index in range(100)]
    case = make_prefill_case(chunks, (16, 8, 64), dtype=torch.float16).to("cuda")
    rule = PrefillRule(16, 0.125)

    assert_close(case.run(kernels, rule), case.attend_exactly(rule))


def test_rows_outside_the_chunks_are_left_alone(kernels: CacheKernels) -> None:
    case = make_prefill_case([Chunk(0, 300), Chunk(0, 200)], dtype=torch.bfloat16).to("cuda")
    rule = PrefillRule(16, 0.125)

    output = case.run(kernels, rule, slice(1, 2))

    assert output[:300].isnan().all()
    assert torch.equal(output[300:], case.run(kernels, rule)[300:])


def test_steps_wait_for_nothing(kernels: CacheKernels) -> None:
    decode = make_decode_case([700, 4096], (8, 2, 128), dtype=torch.bfloat16).to("cuda")
    prefill = make_prefill_case([Chunk(0, 300)], dtype=torch.bfloat16).to("cuda")
    expected = (
        decode.run(kernels, DecodeRule(16, 0.1)),
        prefill.run(kernels, PrefillRule(16, 0.1)),
    )

    torch.cuda.set_sync_debug_mode("error")
    try:
        again = (
            decode.run(kernels, DecodeRule(16, 0.1)),
            prefill.run(kernels, PrefillRule(16, 0.1)),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other)


def test_decode_is_captured_as_a_graph_and_follows_its_contexts(kernels: CacheKernels) -> None:
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
