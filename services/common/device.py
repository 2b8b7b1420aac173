"""Choose where a model computes, and send it values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np


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


def send(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return ``values`` on ``device``; on a CPU the same memory, on a GPU without waiting for it.

    Args:
        values: Numbers of any shape, contiguous.
        device: Where they are read.
    """
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
