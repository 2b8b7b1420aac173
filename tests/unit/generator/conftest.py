"""Fixtures of the generator's tests: tiny checkpoints, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.fakes.checkpoints import make_llava, make_qwen2_5_vl, make_qwen2_vl
from tests.fakes.gemma_checkpoints import make_gemma3
from tests.fakes.whole_model import WholeModel

if TYPE_CHECKING:
    from pathlib import Path

MAKERS = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava": make_llava,
    "gemma3": make_gemma3,
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return where models compute; the tests for GPUs have another one."""
    return torch.device("cpu")


@pytest.fixture(scope="session", params=MAKERS)
def whole_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> WholeModel:
    """Return a tiny checkpoint of each family with its whole model as the reference."""
    path: Path = tmp_path_factory.mktemp(request.param)
    return WholeModel(MAKERS[request.param](path))
