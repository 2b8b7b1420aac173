"""A device that is asked for is there, or the start ends with the reason."""

from __future__ import annotations

import pytest
import torch

from chiasm.common.device import DeviceUnavailableError, find_device


@pytest.mark.parametrize(
    ("name", "has_gpu", "found"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_auto_takes_a_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, has_gpu: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    assert find_device(name) == torch.device(found)


@pytest.mark.parametrize(("built", "reason"), [("13.0", "sees none"), (None, "without CUDA")])
def test_a_gpu_that_is_not_there_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, built: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)

    with pytest.raises(DeviceUnavailableError, match=reason):
        find_device("cuda")
