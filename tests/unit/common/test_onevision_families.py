"""Layouts of LLaVA-OneVision planned from a size equal what transformers counts."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.common import torchvision_shim
from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import SampledVideo, UnsupportedModelError
from chiasm.common.families.llava_onevision import (
    choose_resolution,
    make_pooled_video_planner,
    make_tile_planner,
)
from chiasm.common.media import ProcessingOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

RESOLUTIONS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
CONFIG: dict[str, Any] = {
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
    "image_token_index": 7,
    "video_token_index": 8,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": RESOLUTIONS,
}
SETTINGS: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "image_grid_pinpoints": RESOLUTIONS,
}
OPTIONS = ProcessingOptions()


def count_by_transformers(height: int, width: int) -> int:
    """Return the features of an image as the processor counts them, without a tokenizer."""
    torchvision_shim.install()
    from transformers import LlavaOnevisionProcessor

    stub: Any = types.SimpleNamespace(
        image_processor=types.SimpleNamespace(image_grid_pinpoints=RESOLUTIONS),
        num_image_tokens=27 * 27,
        vision_aspect_ratio="anyres_max_9",
    )
    stub._get_unpadded_features = types.MethodType(
        LlavaOnevisionProcessor._get_unpadded_features, stub
    )
    return LlavaOnevisionProcessor._get_number_of_features(stub, height, width, 384, 384)


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_images_of_any_size_have_the_tokens_that_the_processor_counts(
    height: int, width: int
) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InvalidRequestError, match="aspect ratio"):
            make_tile_planner(CONFIG, SETTINGS).plan(height, width, OPTIONS)
        return

    plan = make_tile_planner(CONFIG, SETTINGS).plan(height, width, OPTIONS)

    assert plan.layout.num_tokens == count_by_transformers(height, width)
    assert {run.token_id for run in plan.layout.runs} == {7}


@settings(max_examples=300, deadline=None)
@given(size=st.tuples(st.integers(1, 9000), st.integers(1, 9000)))
def test_the_best_resolution_is_that_of_transformers(size: tuple[int, int]) -> None:
    torchvision_shim.install()
    from transformers.image_processing_utils import select_best_resolution

    resolutions = [(height, width) for height, width in RESOLUTIONS]

    assert choose_resolution(size, resolutions) == select_best_resolution(size, resolutions)


def test_videos_have_196_tokens_a_frame_and_a_newline() -> None:
    planner = make_pooled_video_planner(CONFIG, SETTINGS)

    plan = planner.plan(SampledVideo(32, 720, 1280, 2.0), OPTIONS)

    assert plan.layout.num_tokens == 32 * 196 + 1
    assert plan.num_pixels == 32 * 384 * 384
    assert plan.layout.runs[0].token_id == 8


@pytest.mark.parametrize(
    ("config", "preprocessor"),
    [
        ({"vision_aspect_ratio": "pad"}, {}),
        ({"vision_aspect_ratio": "anyres_max_0"}, {}),
        ({"image_grid_pinpoints": [[384, 384]]}, {}),
        ({"vision_feature_select_strategy": "default"}, {}),
        ({"vision_config": {"model_type": "clip_vision_model", "image_size": 336}}, {}),
        ({"image_token_index": None}, {}),
        ({}, {"size": {"height": 336, "width": 336}}),
        ({}, {"image_grid_pinpoints": None}),
    ],
)
def test_checkpoints_that_would_be_planned_wrongly_are_refused(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError):
        make_tile_planner({**CONFIG, **config}, {**SETTINGS, **preprocessor})


def test_sizes_are_those_of_the_checkpoint_alone() -> None:
    wishes = ProcessingOptions(min_pixels=1, max_pixels=10)

    assert not make_tile_planner(CONFIG, SETTINGS).processor_arguments(9, 9, wishes)
    assert make_pooled_video_planner(CONFIG, SETTINGS).processor_size(wishes) is None
    assert np.isfinite(make_tile_planner(CONFIG, SETTINGS).plan(1, 200, wishes).num_pixels)
