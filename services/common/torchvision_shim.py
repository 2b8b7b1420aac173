"""Make a torchvision wheel importable whose compiled operators do not fit the installed torch.

The wheel on PyPI is built for CUDA: beside a CPU torch its operator library cannot be loaded, and
``import torchvision`` fails because ``torchvision::nms`` does not exist. The image transforms that
the checkpoints' processors use are plain torch; declaring the two missing operators is enough.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

_MISSING_OPERATORS = ("nms", "qnms")


@functools.cache
def install() -> bool:
    """Make ``import torchvision`` work; call before anything imports it.

    Returns:
        Whether torchvision is installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    if not _load_operators(Path(spec.origin).parent):
        _declare_operators()
    return True


def _load_operators(folder: Path) -> bool:
    for library in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]  # torch's own
        except OSError:
            return False
        return True
    return False


@functools.cache
def _declare_operators() -> torch.library.Library:
    # torch annotates none of this class; the cache keeps it, and with it the operators, alive.
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in _MISSING_OPERATORS:
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    return library
