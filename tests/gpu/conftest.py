"""What all tests on a GPU need: the device, exact float32, and tiny checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.fakes.checkpoints import make_llava, make_qwen2_5_vl
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.gemma_checkpoints import make_gemma3
from tests.fakes.whole_model import WholeModel

if TYPE_CHECKING:
    from collections.abc import Iterator

MAKERS = {
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "llava": make_llava,
    "gemma3": make_gemma3,
}


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[torch.device]:
    """Yield the GPU; without one, every test of this folder is skipped.

    Matrix units round the inputs of float32 convolutions to 10 bits unless they are told not to.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(scope="session", params=MAKERS)
def whole_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> WholeModel:
    """Return a tiny checkpoint with its whole model, which computes on the CPU."""
    return WholeModel(MAKERS[request.param](tmp_path_factory.mktemp(request.param)))
