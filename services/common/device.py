"""Choose where a model computes."""

from __future__ import annotations

import torch


class DeviceUnavailableError(Exception):
    """The device that was asked for is not there."""


def find_device(name: str) -> torch.device:
    """Return the device that ``name`` stands for.

    Args:
        name: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.

    Raises:
        DeviceUnavailableError: ``cuda`` is asked for, but torch sees no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        reason = "sees none" if torch.version.cuda else "was built without CUDA"
        raise DeviceUnavailableError(f"A GPU is asked for, but torch {torch.__version__} {reason}.")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")
