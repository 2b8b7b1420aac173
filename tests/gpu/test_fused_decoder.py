"""The fused decoder on a GPU: text models with windows, caps, norms and rotations of every kind.

The tests are those of the CPU; the reference for tokens computes there.
"""

from __future__ import annotations

import pytest

from tests.fakes.text_models import TEXT_CONFIGS, make_text_model
from tests.fakes.whole_model import WholeModel
from tests.unit.generator.test_fused_decoder import (
    prompts,
    test_chunks_beside_decodes_change_no_token,
    test_logits_are_near_those_of_transformers,
    test_tokens_equal_the_whole_model,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

__all__ = [
    "prompts",
    "test_chunks_beside_decodes_change_no_token",
    "test_logits_are_near_those_of_transformers",
    "test_tokens_equal_the_whole_model",
]


@pytest.fixture(scope="module", params=TEXT_CONFIGS)
def text_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> WholeModel:
    path = tmp_path_factory.mktemp(request.param)
    return WholeModel(make_text_model(path, request.param), attention="eager")
