"""Videos of Qwen3-VL are planned from their size and times as transformers does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.common import torchvision_shim
from chiasm.common.families import SampledVideo, UnsupportedModelError, family_of
from chiasm.common.families.qwen3_vl import (
    count_deepstack_levels,
    make_timed_video_planner,
    smart_resize_video,
)
from chiasm.common.media import PatchGrid, ProcessingOptions, TokenRun

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "video_token_id": 7,
    "vision_start_token_id": 8,
    "vision_end_token_id": 9,
    "vision_config": {"spatial_merge_size": 2, "deepstack_visual_indexes": [5, 11, 17]},
}
SETTINGS: dict[str, Any] = {
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "max_video_tokens": 4,
}


def video_of(num_frames: int, height: int, width: int) -> SampledVideo:
    times = tuple(number * 0.5 for number in range(num_frames))
    return SampledVideo(num_frames, height, width, 2.0, times)


@settings(max_examples=300, deadline=None)
@given(
    num_frames=st.integers(2, 800),
    height=st.integers(20, 3000),
    width=st.integers(20, 3000),
    low=st.sampled_from([1024, 131_072]),
    high=st.sampled_from([200_000, 25_165_824]),
)
def test_frames_are_resized_as_the_processor_does(
    num_frames: int, height: int, width: int, low: int, high: int
) -> None:
    torchvision_shim.install()
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    expected = smart_resize(num_frames, height, width, 2, 32, low, high)

    assert smart_resize_video(video_of(num_frames, height, width), 2, 32, low, high) == expected


def test_times_stand_before_every_patch_of_two_frames() -> None:
    planner = make_timed_video_planner(CONFIG, SETTINGS)

    plan = planner.plan(video_of(5, 320, 320), ProcessingOptions())

    assert plan.layout.grid is not None
    num_tokens = plan.layout.grid.h * plan.layout.grid.w // 4
    assert plan.layout.grid.t == 3
    assert [piece for piece in plan.pieces if isinstance(piece, str)] == [
        "<0.2 seconds>",
        "<1.2 seconds>",
        "<2.0 seconds>",
    ]
    assert plan.pieces[1:4] == (
        TokenRun(8, 1, is_embedding=False),
        TokenRun(7, num_tokens, is_embedding=True),
        TokenRun(9, 1, is_embedding=False),
    )


def test_a_bound_of_each_frame_is_kept_where_the_checkpoint_has_one() -> None:
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 768}
    settings = {**SETTINGS, "size": size}
    options = ProcessingOptions()

    free = make_timed_video_planner(CONFIG, settings).plan(video_of(4, 320, 320), options)
    bound = make_timed_video_planner(CONFIG, {**settings, "cap_pixels_per_frame": True})

    assert free.layout.grid == PatchGrid(2, 20, 20)
    assert bound.plan(video_of(4, 320, 320), options).layout.grid == PatchGrid(2, 4, 4)


def test_the_family_tells_its_deepstack_levels() -> None:
    assert family_of(CONFIG).count_deepstack_levels(CONFIG) == 3
    with pytest.raises(UnsupportedModelError, match="deepstack_visual_indexes"):
        count_deepstack_levels({"vision_config": {}})


def test_bounds_can_be_lowered_by_a_client() -> None:
    planner = make_timed_video_planner(CONFIG, SETTINGS)

    plan = planner.plan(video_of(4, 640, 640), ProcessingOptions(max_pixels=40_000))

    assert plan.num_pixels <= 40_000
    assert planner.processor_size(ProcessingOptions(max_pixels=40_000)) == {
        "shortest_edge": 40_000,
        "longest_edge": 40_000,
    }
