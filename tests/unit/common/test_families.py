"""Layouts planned from an image's size equal what the checkpoint's processor makes of it."""

from __future__ import annotations

import functools
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import (
    PositionScheme,
    UnsupportedModelError,
    family_of,
)
from chiasm.common.media import Modality, PatchGrid, ProcessingOptions
from tests.fakes.checkpoints import load_whole, make_llava, make_qwen2_vl

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chiasm.common.families import ImagePlanner


SIZES = [
    *((1, 1), (1, 3), (3, 1), (2, 27), (13, 14), (28, 28), (29, 27), (56, 57)),
    *((1, 200), (200, 1), (97, 131), (640, 480), (333, 999), (15, 2999), (1024, 1024)),
]


@pytest.fixture(scope="module")
def qwen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def llava_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def load_config(path: Path) -> Mapping[str, object]:
    config: dict[str, object] = json.loads((path / "config.json").read_text())
    return config


def make_planner(config: Mapping[str, object], settings: Mapping[str, object]) -> ImagePlanner:
    make = family_of(config).make_image_planner
    assert make is not None
    return make(config, settings)


@functools.cache
def load_planner(path: Path) -> tuple[Any, ImagePlanner]:
    _, processor = load_whole(path)
    config = load_config(path)
    planner = make_planner(config, processor.image_processor.to_dict())
    return processor, planner


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_qwen_grids_equal_the_processor(qwen_path: Path, width: int, height: int) -> None:
    processor, planner = load_planner(qwen_path)
    image = np.zeros((height, width, 3), dtype=np.uint8)

    features = processor.image_processor([image], input_data_format="channels_last")
    grid = np.asarray(features["image_grid_thw"])[0].tolist()
    layout = planner.plan(height, width, ProcessingOptions()).layout

    assert layout.grid == PatchGrid(*grid)
    assert layout.num_tokens == layout.num_embedding_tokens == math.prod(grid) // 4


@pytest.mark.parametrize(("width", "height"), [(97, 131), (1000, 30), (8, 8)])
@pytest.mark.parametrize(
    "options",
    [
        ProcessingOptions(min_pixels=10_000),
        ProcessingOptions(max_pixels=9_000),
        ProcessingOptions(min_pixels=8_000, max_pixels=20_000),
    ],
)
def test_qwen_options_reach_the_processor(
    qwen_path: Path, width: int, height: int, options: ProcessingOptions
) -> None:
    processor, planner = load_planner(qwen_path)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    arguments = planner.processor_arguments(height, width, options)

    features = processor.image_processor([image], input_data_format="channels_last", **arguments)
    layout = planner.plan(height, width, options).layout

    assert layout.grid == PatchGrid(*np.asarray(features["image_grid_thw"])[0].tolist())


def test_a_client_may_lower_the_largest_area_but_not_raise_it(qwen_path: Path) -> None:
    _, planner = load_planner(qwen_path)
    plain = planner.plan(900, 900, ProcessingOptions())

    lowered = planner.plan(900, 900, ProcessingOptions(max_pixels=28 * 28 * 4))
    raised = planner.plan(900, 900, ProcessingOptions(max_pixels=2**32 - 1, min_pixels=2**32 - 1))

    assert lowered.layout.num_tokens == 4
    assert raised.layout.num_tokens <= 64
    assert raised.num_pixels <= 28 * 28 * 64
    assert plain.layout.num_tokens == 64


@pytest.mark.parametrize("value", [0, 1, 783])
def test_bounds_below_one_token_mean_one_token(qwen_path: Path, value: int) -> None:
    _, planner = load_planner(qwen_path)

    layout = planner.plan(5, 5, ProcessingOptions(min_pixels=value, max_pixels=value)).layout

    assert layout.num_tokens == 1


@pytest.mark.parametrize("path_name", ["qwen_path", "llava_path"])
def test_aspect_ratios_up_to_200_are_planned_and_others_refused(
    path_name: str, request: pytest.FixtureRequest
) -> None:
    _, planner = load_planner(request.getfixturevalue(path_name))

    planner.plan(1, 200, ProcessingOptions())
    planner.plan(400, 2, ProcessingOptions())
    for height, width in [(1, 201), (401, 2)]:
        with pytest.raises(InvalidRequestError, match="aspect ratio") as caught:
            planner.plan(height, width, ProcessingOptions())
        assert caught.value.reason == "INVALID_MEDIA"


def test_llava_takes_the_same_tokens_for_every_size(llava_path: Path) -> None:
    processor, planner = load_planner(llava_path)
    sizes = [(10, 10), (97, 131), (640, 480)]
    expected = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens

    counts = [planner.plan(h, w, ProcessingOptions()).layout.num_tokens for h, w in sizes]

    assert counts == expected == [16, 16, 16]
    assert not planner.processor_arguments(9, 9, ProcessingOptions(max_pixels=9))


def test_llava_counts_the_class_token_unless_it_is_dropped(llava_path: Path) -> None:
    config = {**load_config(llava_path), "vision_feature_select_strategy": "full"}
    processor, _ = load_planner(llava_path)

    planner = make_planner(config, processor.image_processor.to_dict())

    assert planner.plan(9, 9, ProcessingOptions()).layout.num_tokens == 17


def test_llava_pixels_count_the_resized_picture_before_the_crop(llava_path: Path) -> None:
    _, planner = load_planner(llava_path)

    assert planner.plan(10, 1000, ProcessingOptions()).num_pixels == 56 * 5600


def test_families_know_their_positions_and_placeholders(qwen_path: Path, llava_path: Path) -> None:
    qwen, llava = load_config(qwen_path), load_config(llava_path)

    assert family_of(qwen).positions is PositionScheme.MROPE
    assert family_of(llava).positions is PositionScheme.LINEAR
    assert family_of(qwen).placeholder_token_id(qwen, Modality.IMAGE) == qwen["image_token_id"]
    assert (
        family_of(llava).placeholder_token_id(llava, Modality.IMAGE) == llava["image_token_index"]
    )


def test_unknown_model_types_name_the_known_ones() -> None:
    known = r"'bert'.*qwen2_vl, qwen2_5_vl, qwen3_vl, llava"
    with pytest.raises(UnsupportedModelError, match=known):
        family_of({"model_type": "bert"})


def test_a_processor_that_merges_otherwise_than_the_tower_is_refused(qwen_path: Path) -> None:
    config = load_config(qwen_path)
    processor, _ = load_planner(qwen_path)
    settings = {**processor.image_processor.to_dict(), "merge_size": 4}

    with pytest.raises(UnsupportedModelError, match="merges 4 patches but the tower 2"):
        make_planner(config, settings)


def test_missing_values_are_named(qwen_path: Path) -> None:
    config = load_config(qwen_path)
    processor, _ = load_planner(qwen_path)
    settings = dict(processor.image_processor.to_dict())
    del settings["patch_size"]

    with pytest.raises(UnsupportedModelError, match="patch_size"):
        make_planner(config, settings)
