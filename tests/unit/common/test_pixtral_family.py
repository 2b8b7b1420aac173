"""What Pixtral and Mistral 3 make of pictures: rows of tokens with breaks between them."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.common import torchvision_shim
from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import PositionScheme, UnsupportedModelError, family_of
from chiasm.common.families.llava import LLAVA
from chiasm.common.families.pixtral import MAX_TOKEN_ROWS, EdgeBound, make_edge_planner
from chiasm.common.families.rows import RowPlanner
from chiasm.common.media import Modality, PatchGrid, ProcessingOptions, TokenRun

if TYPE_CHECKING:
    from collections.abc import Mapping

PIXTRAL_CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 10,
    "image_break_token_id": 12,
    "image_end_token_id": 13,
    "vision_feature_select_strategy": "full",
    "vision_config": {"model_type": "pixtral", "patch_size": 16},
}
MISTRAL3_CONFIG: dict[str, Any] = {
    "model_type": "mistral3",
    "image_token_index": 10,
    "image_break_token_id": 12,
    "image_end_token_id": 13,
    "spatial_merge_size": 2,
    "vision_config": {"model_type": "pixtral", "patch_size": 14},
}
CONFIGS = {"pixtral": (PIXTRAL_CONFIG, 1024), "mistral3": (MISTRAL3_CONFIG, 1540)}
OPTIONS = ProcessingOptions()
SIDES = st.integers(1, 5000)

both = pytest.mark.parametrize("name", CONFIGS)


def planner_of(name: str) -> Any:
    config, longest_edge = CONFIGS[name]
    make = family_of(config).make_image_planner
    assert make is not None
    return make(config, {"size": {"longest_edge": longest_edge}})


@functools.cache
def processor_of(name: str) -> Any:
    """Return a stub of the family's processor, without a tokenizer."""
    torchvision_shim.install()
    from transformers import PixtralProcessor

    processor: Any = PixtralProcessor.__new__(PixtralProcessor)
    processor.patch_size = CONFIGS[name][0]["vision_config"]["patch_size"]
    processor.spatial_merge_size = CONFIGS[name][0].get("spatial_merge_size", 1)
    for number, kind in ((10, "image"), (12, "image_break"), (13, "image_end")):
        setattr(processor, f"{kind}_token", f"<{number}>")
    return processor


def resize_by_transformers(height: int, width: int, edge: int, side: int) -> tuple[int, int]:
    torchvision_shim.install()
    from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

    picture = np.broadcast_to(np.uint8(0), (height, width, 3))
    rows, columns = get_resize_output_image_size(
        picture, edge, side, input_data_format="channels_last"
    )
    return rows, columns


@both
@settings(max_examples=200, deadline=None)
@given(height=SIDES, width=SIDES)
def test_pictures_of_any_size_have_the_tokens_that_the_processor_writes(
    name: str, height: int, width: int
) -> None:
    planner = planner_of(name)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InvalidRequestError, match="aspect ratio"):
            planner.plan(height, width, OPTIONS)
        return
    bound = planner.bound
    size = resize_by_transformers(height, width, bound.longest_edge, bound.token_side)
    written = processor_of(name).replace_image_token({"image_sizes": [size]}, 0)

    plan = planner.plan(height, width, OPTIONS)

    assert "".join(f"<{token}>" for token in plan.layout.expand()) == written
    assert plan.num_pixels == math.prod(size)
    patch_size = planner.patch_size
    assert plan.layout.grid == PatchGrid(1, size[0] // patch_size, size[1] // patch_size)
    assert plan.layout.num_embedding_tokens == math.prod(size) // bound.token_side**2
    assert planner.processor_arguments(height, width, OPTIONS) == {"patch_size": bound.token_side}


def test_a_square_picture_fills_the_largest_grid() -> None:
    plan = planner_of("pixtral").plan(3000, 3000, OPTIONS)
    merged = planner_of("mistral3").plan(3000, 3000, OPTIONS)

    assert plan.layout.num_tokens == 64 * 65
    assert merged.layout.num_tokens == 55 * 56
    assert merged.layout.spatial_merge_size == 2


@both
@settings(max_examples=200, deadline=None)
@given(height=SIDES, width=SIDES, max_pixels=st.integers(1, 3_000_000))
def test_a_wish_for_an_area_is_the_widest_edge_that_keeps_it(
    name: str, height: int, width: int, max_pixels: int
) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    planner, options = planner_of(name), ProcessingOptions(max_pixels=max_pixels)
    side = planner.bound.token_side

    plan = planner.plan(height, width, options)
    arguments = planner.processor_arguments(height, width, options)

    edge = arguments["size"]["longest_edge"]
    assert plan.num_pixels == math.prod(resize_by_transformers(height, width, edge, side))
    wider = math.prod(resize_by_transformers(height, width, edge + 1, side))
    assert wider > max_pixels or edge == planner.bound.longest_edge
    least = -(-max(height, width) // min(height, width))
    assert plan.num_pixels <= max_pixels or edge == least


def test_pictures_are_not_enlarged() -> None:
    planner = planner_of("pixtral")
    wishes = ProcessingOptions(min_pixels=1_000_000, max_pixels=2**32 - 1)

    assert planner.plan(20, 20, wishes) == planner.plan(20, 20, OPTIONS)
    assert planner.plan(3000, 20, wishes) == planner.plan(3000, 20, OPTIONS)


def test_a_picture_of_which_nothing_would_be_left_is_refused() -> None:
    planner = make_edge_planner(PIXTRAL_CONFIG, {"size": {"longest_edge": 64}})

    assert planner.plan(64, 1, OPTIONS).layout.num_tokens == 4 * 2
    with pytest.raises(InvalidRequestError, match="1x65 pixels nothing would be left") as caught:
        planner.plan(65, 1, OPTIONS)
    assert caught.value.reason == "INVALID_MEDIA"
    assert EdgeBound(16, 64).resize(1, 65) == (0, 64)


@both
def test_ready_made_rows_stand_as_encoded_ones_do(name: str) -> None:
    config, _ = CONFIGS[name]
    encoded = planner_of(name).plan(300, 500, OPTIONS).layout
    planner = RowPlanner.of(family_of(config), config)

    assert planner.plan(Modality.IMAGE, encoded.num_embedding_tokens, encoded.grid) == encoded
    with pytest.raises(InvalidRequestError, match=r"fields: {image_embeds, image_grid_thw}"):
        planner.plan(Modality.IMAGE, encoded.num_embedding_tokens, None)
    with pytest.raises(InvalidRequestError, match="makes"):
        planner.plan(Modality.IMAGE, encoded.num_embedding_tokens + 1, encoded.grid)


def test_ready_made_rows_fill_whole_tokens_and_no_more_rows_than_bounded() -> None:
    plain, merged = (
        RowPlanner.of(family_of(config), config) for config in (PIXTRAL_CONFIG, MISTRAL3_CONFIG)
    )
    most = MAX_TOKEN_ROWS

    layout = plain.plan(Modality.IMAGE, 3, PatchGrid(1, 1, 3))
    assert layout.runs == (TokenRun(10, 3, is_embedding=True), TokenRun(13, 1, is_embedding=False))
    assert len(plain.plan(Modality.IMAGE, most, PatchGrid(1, most, 1)).runs) == 2 * most
    with pytest.raises(InvalidRequestError, match=f"at most {most} rows of tokens") as caught:
        plain.plan(Modality.IMAGE, most + 1, PatchGrid(1, most + 1, 1))
    assert caught.value.reason == "INVALID_EMBEDDING"
    with pytest.raises(InvalidRequestError, match="must be multiples of 2"):
        merged.plan(Modality.IMAGE, 3, PatchGrid(1, 3, 4))


def test_the_tower_tells_the_family_of_models_of_one_type() -> None:
    clip = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}

    assert family_of(PIXTRAL_CONFIG) is family_of(MISTRAL3_CONFIG) is not LLAVA
    assert family_of(PIXTRAL_CONFIG).positions is PositionScheme.LINEAR
    assert family_of(clip) is family_of({"model_type": "llava"}) is LLAVA
    with pytest.raises(
        UnsupportedModelError,
        match=r"'mistral3' with a tower of type 'siglip_vision_model'.*: .*llava, mistral3",
    ):
        family_of({**MISTRAL3_CONFIG, "vision_config": {"model_type": "siglip_vision_model"}})


@pytest.mark.parametrize(
    ("config", "preprocessor"),
    [
        ({"vision_feature_select_strategy": "default"}, {}),
        ({"vision_feature_select_strategy": None}, {}),
        ({"image_break_token_id": None}, {}),
        ({"image_end_token_id": None}, {}),
        ({"image_token_index": None}, {}),
        ({"vision_config": {"model_type": "pixtral"}}, {}),
        ({"model_type": "mistral3"}, {}),
        ({}, {"size": {"height": 1024, "width": 1024}}),
    ],
)
def test_checkpoints_that_would_be_planned_wrongly_are_refused(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> None:
    settings = {"size": {"longest_edge": 1024}, **preprocessor}

    make_edge_planner(PIXTRAL_CONFIG, {"size": {"longest_edge": 1024}})
    with pytest.raises(UnsupportedModelError):
        make_edge_planner({**PIXTRAL_CONFIG, **config}, settings)
