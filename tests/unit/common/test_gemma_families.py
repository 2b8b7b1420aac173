"""Pictures of Gemma 3 become one layout, whose rows attend to one another both ways."""

from __future__ import annotations

from typing import Any

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import PositionScheme, UnsupportedModelError, family_of
from chiasm.common.families.gemma3 import make_square_planner
from chiasm.common.families.rows import RowPlanner
from chiasm.common.media import MediaLayout, Modality, Placeholder, ProcessingOptions, TokenRun

CONFIG: dict[str, Any] = {
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
    "image_token_index": 262_144,
    "vision_config": {"image_size": 896},
}
SETTINGS: dict[str, Any] = {"size": {"height": 896, "width": 896}, "do_pan_and_scan": None}
LAYOUT = MediaLayout(
    (
        TokenRun(255_999, 1, is_embedding=False),
        TokenRun(262_144, 256, is_embedding=True),
        TokenRun(256_000, 1, is_embedding=False),
    ),
    attends_both_ways=True,
)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (900, 30), (50, 4000)])
def test_every_picture_becomes_the_same_between_its_tokens(height: int, width: int) -> None:
    planner = make_square_planner(CONFIG, SETTINGS)

    plan = planner.plan(height, width, ProcessingOptions(max_pixels=100))

    assert (plan.layout, plan.num_pixels) == (LAYOUT, 896 * 896)
    assert planner.processor_size(ProcessingOptions(max_pixels=100)) is None


def test_a_line_is_refused_as_everywhere() -> None:
    with pytest.raises(InvalidRequestError, match="aspect ratio of 1000x1"):
        make_square_planner(CONFIG, SETTINGS).plan(1, 1000, ProcessingOptions())


def test_the_template_s_token_stands_between_blank_lines() -> None:
    family = family_of(CONFIG)

    assert family.placeholder(CONFIG, Modality.IMAGE) == Placeholder(255_999, "\n\n", "\n\n")
    assert family.positions is PositionScheme.LINEAR
    assert family.modalities == (Modality.IMAGE,)


def test_pan_and_scan_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"pan and scan.*do_pan_and_scan to false"):
        make_square_planner(CONFIG, {**SETTINGS, "do_pan_and_scan": True})


def test_another_size_than_the_tower_s_is_refused() -> None:
    settings = {**SETTINGS, "size": {"height": 896, "width": 448}}

    with pytest.raises(UnsupportedModelError, match="448x896 pixels but the tower takes 896x896"):
        make_square_planner(CONFIG, settings)


def test_ready_made_rows_are_laid_out_alike_and_must_be_as_many() -> None:
    planner = RowPlanner.of(family_of(CONFIG), CONFIG)

    assert planner.plan(Modality.IMAGE, 256, None) == LAYOUT
    with pytest.raises(InvalidRequestError, match="has 256 embeddings, but there are 255 rows"):
        planner.plan(Modality.IMAGE, 255, None)
