"""Which kernels read a cache, and what is said of it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from structlog.testing import capture_logs

from chiasm.generator.model.find_cache_kernels import find_cache_kernels
from chiasm.kernels.cpu.native import CpuKernels

CUDA = torch.device("cuda")
MODULE = "chiasm.kernels.triton_kernels"


class _Kernels:
    """Stands for Triton's kernels where there is no GPU."""

    def check(self, device: torch.device) -> None:
        assert device == CUDA


class _BrokenKernels:
    def check(self, device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.")


def _put(monkeypatch: pytest.MonkeyPatch, kernels: type) -> None:
    module = types.ModuleType(MODULE)
    module.TritonKernels = kernels  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, MODULE, module)


def test_cache_on_a_gpu_is_read_by_tritons_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    _put(monkeypatch, _Kernels)

    with capture_logs() as logs:
        kernels = find_cache_kernels(CUDA, torch.bfloat16, "auto")

    assert isinstance(kernels, _Kernels)
    assert [(log["event"], log["kernels"]) for log in logs] == [("gpu_kernels_chosen", "triton")]


def test_without_triton_torch_attends_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)

    with capture_logs() as logs:
        assert find_cache_kernels(CUDA, torch.bfloat16, "auto") is None

    (log,) = logs
    assert (log["event"], log["kernels"]) == ("gpu_kernels_chosen", "torch")
    assert log["reason"].startswith("ModuleNotFoundError")
    assert "install triton" in log["remedy"]


def test_kernels_that_do_not_run_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _put(monkeypatch, _BrokenKernels)

    with capture_logs() as logs:
        assert find_cache_kernels(CUDA, torch.bfloat16, "auto") is None

    assert logs[0]["reason"] == "RuntimeError: Failed to find C compiler."


def test_cache_on_a_cpu_is_read_by_compiled_kernels_if_they_know_its_dtype(
    monkeypatch: pytest.MonkeyPatch, kernel_library: object
) -> None:
    monkeypatch.setattr("chiasm.kernels.cpu.native._compiled_path", lambda: kernel_library)
    cpu = torch.device("cpu")

    assert isinstance(find_cache_kernels(cpu, torch.float32, "plain"), CpuKernels)
    assert find_cache_kernels(cpu, torch.float32, "off") is None
    assert find_cache_kernels(cpu, torch.float16, "plain") is None


def test_first_launch_of_tritons_kernels_is_checked(triton_device: str) -> None:
    from chiasm.kernels.triton_kernels import TritonKernels

    class Wrong(TritonKernels):
        def paged_decode(self, query: torch.Tensor, *_: object) -> torch.Tensor:
            return query + 1

    TritonKernels().check(torch.device(triton_device))
    with pytest.raises(RuntimeError, match="wrong numbers"):
        Wrong().check(torch.device(triton_device))
