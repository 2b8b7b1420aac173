"""The compiled kernels against torch, and what happens without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from chiasm.kernels.cache_kernels import DecodeRule
from chiasm.kernels.cpu import native
from chiasm.kernels.cpu.native import (
    CpuKernels,
    KernelsUnavailableError,
    find_kernels,
)
from tests.fakes.attention_cases import make_decode_case
from tests.harness.native_build import compile_kernels

TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1e-2)}


def _assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[output.dtype]
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 8, 9]),
    head_dim=st.sampled_from([1, 3, 8, 16, 33, 40, 64, 80, 96, 128, 130, 256]),
    block_size=st.sampled_from([1, 3, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([0, 1, 7, 128, 1000]),
    softcap=st.sampled_from([0.0, 2.0, 50.0]),
)
def test_paged_decode_equals_torch(
    kernels: CpuKernels,
    lengths: list[int],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int,
    softcap: float,
) -> None:
    heads = (num_kv_heads * group, num_kv_heads, head_dim)
    case = make_decode_case(lengths, heads, block_size, dtype)
    rule = DecodeRule(block_size, head_dim**-0.5, window, softcap)

    output = case.run(kernels, rule)

    assert output.is_contiguous()
    _assert_close(output, case.attend_exactly(rule))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("group", [2, 7])
def test_row_is_the_same_to_the_bit_in_any_batch_and_with_any_threads(
    kernels: CpuKernels, dtype: torch.dtype, num_threads: int, group: int
) -> None:
    case = make_decode_case([700, 1, 129, 128, 300], (2 * group, 2, 64), dtype=dtype)
    rule = DecodeRule(16, 0.125)
    together = case.run(kernels, rule)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = [case.run(kernels, rule, slice(row, row + 1)) for row in range(5)]
    finally:
        torch.set_num_threads(before)

    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 17])
def test_groups_of_queries_equal_torch_whether_rows_are_read_in_place_or_not(
    kernels: CpuKernels, group: int, head_dim: int, window: int
) -> None:
    # A window of 200 begins at a multiple of sixteen for one of the sequences only.
    case = make_decode_case([296, 301, 16, 1], (2 * group, 2, head_dim), 16, torch.bfloat16)
    rule = DecodeRule(16, head_dim**-0.5, window)

    output = case.run(kernels, rule)

    assert output.isfinite().all()
    _assert_close(output, case.attend_exactly(rule))


@pytest.mark.parametrize("factor", [1e-3, 100.0, 1e4])
def test_scores_of_any_size_give_finite_outputs(kernels: CpuKernels, factor: float) -> None:
    case = make_decode_case([300, 20])
    rule = DecodeRule(16, factor)

    output = case.run(kernels, rule)

    assert output.isfinite().all()
    torch.testing.assert_close(output, case.attend_exactly(rule), rtol=1e-3, atol=1e-3)


def test_no_sequences_give_no_rows(kernels: CpuKernels) -> None:
    case = make_decode_case([5])

    assert case.run(kernels, DecodeRule(16, 1.0), slice(0, 0)).shape == (0, 4, 64)


def test_kernels_bring_no_second_openmp_runtime(kernels: CpuKernels) -> None:
    make_decode_case([5]).run(kernels, DecodeRule(16, 1.0))

    mapped = Path("/proc/self/maps").read_text("utf-8").splitlines()
    runtimes = {line.split()[-1] for line in mapped if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


def test_install_without_compiler_names_the_remedy_and_leaves_it_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))

    with capture_logs() as logs:
        assert find_kernels("auto") is None

    assert logs[0]["reason"] == "the install found no compiler"
    assert "install g++" in logs[0]["remedy"]


def test_instruction_set_that_was_asked_for_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))

    with pytest.raises(KernelsUnavailableError):
        find_kernels("plain")


def test_what_is_found_is_used_unless_switched_off(
    monkeypatch: pytest.MonkeyPatch, kernel_library: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "_native.test.so").symlink_to(kernel_library)

    monkeypatch.setattr(CpuKernels, "level", "avx2")

    assert find_kernels("auto") is not None
    assert find_kernels("off") is None


def test_machine_with_plain_kernels_only_takes_torch(
    monkeypatch: pytest.MonkeyPatch, kernel_library: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(CpuKernels, "level", "plain")
    (tmp_path / "_native.test.so").symlink_to(kernel_library)

    assert find_kernels("auto") is None
    assert find_kernels("plain") is not None


def test_file_that_is_no_library_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "_native.so"
    path.write_bytes(b"no library")

    with pytest.raises(KernelsUnavailableError, match=r"cannot load _native\.so"):
        CpuKernels(path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_touch_only_their_own_memory(tmp_path: Path, kernel_library: Path) -> None:
    if "KERNELS_UNDER_TEST" in os.environ:
        pytest.skip("this is the inner run")
    sanitized = compile_kernels(tmp_path, "-fsanitize=address", "-g", "-O1")
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "KERNELS_UNDER_TEST": str(sanitized),
    }
    names = "same_to_the_bit or any_size or equals_torch or equal_torch"
    files = (
        __file__,
        str(Path(__file__).with_name("test_paged_prefill.py")),
        str(Path(__file__).with_name("test_elementwise.py")),
        str(Path(__file__).with_name("test_quantized_linear.py")),
        str(Path(__file__).with_name("test_tiled_linear.py")),
    )
    command = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", *files]

    done = subprocess.run(
        [*command, "-k", names, "-o", "timeout=500"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
