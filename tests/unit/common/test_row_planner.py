"""Ready-made rows are laid out from their number and grid, or refused."""

from __future__ import annotations

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import family_of
from chiasm.common.families.rows import MAX_TEMPORAL_PATCHES, RowPlanner
from chiasm.common.media import MediaLayout, Modality, PatchGrid, TokenRun

GRIDS = RowPlanner(
    {Modality.IMAGE: 7, Modality.VIDEO: 8, Modality.AUDIO: 9}, merge_size=2, frames_per_patch=2
)
PLAIN = RowPlanner({Modality.IMAGE: 7}, merge_size=0)


def test_a_family_without_grids_takes_any_number_of_rows() -> None:
    assert PLAIN.plan(Modality.IMAGE, 5, None) == MediaLayout((TokenRun(7, 5, is_embedding=True),))
    with pytest.raises(InvalidRequestError, match="no patch grid; leave image_grid_thw out"):
        PLAIN.plan(Modality.IMAGE, 5, PatchGrid(1, 2, 10))


def test_a_grid_makes_one_row_of_four_patches() -> None:
    grid = PatchGrid(3, 4, 6)

    layout = GRIDS.plan(Modality.VIDEO, 18, grid)

    assert layout == MediaLayout(
        (TokenRun(8, 18, is_embedding=True),),
        grid=grid,
        spatial_merge_size=2,
        timestamps_s=(0.0, 1.0, 2.0),
    )


def test_the_rate_of_a_video_tells_the_times_of_its_patches() -> None:
    grid = PatchGrid(3, 4, 6)
    assert GRIDS.plan(Modality.VIDEO, 18, grid, fps=4).timestamps_s == (0.0, 0.5, 1.0)
    assert GRIDS.plan(Modality.IMAGE, 6, PatchGrid(1, 4, 6), fps=4).timestamps_s == ()


def test_the_temporal_patches_of_a_video_are_bounded() -> None:
    most = MAX_TEMPORAL_PATCHES
    assert len(GRIDS.plan(Modality.VIDEO, most, PatchGrid(most, 2, 2)).timestamps_s) == most
    with pytest.raises(InvalidRequestError, match="at most 2048 temporal patches"):
        GRIDS.plan(Modality.VIDEO, most + 1, PatchGrid(most + 1, 2, 2))


def test_sound_has_no_grid_in_any_family() -> None:
    assert GRIDS.plan(Modality.AUDIO, 3, None).num_embedding_tokens == 3


@pytest.mark.parametrize(
    ("modality", "num_rows", "grid", "text"),
    [
        (Modality.IMAGE, 6, None, "fields: {image_embeds, image_grid_thw}"),
        (Modality.IMAGE, 5, PatchGrid(1, 4, 6), "makes 6 embeddings, but there are 5 rows"),
        (Modality.IMAGE, 7, PatchGrid(1, 4, 6), "makes 6 embeddings, but there are 7 rows"),
        (Modality.IMAGE, 12, PatchGrid(2, 4, 6), "one temporal patch, but image_grid_thw says 2"),
        (Modality.VIDEO, 6, PatchGrid(1, 3, 8), "video_grid_thw must be multiples of 2"),
        (Modality.VIDEO, 6, PatchGrid(1, 8, 3), "video_grid_thw must be multiples of 2"),
    ],
)
def test_rows_and_grid_must_agree(
    modality: Modality, num_rows: int, grid: PatchGrid | None, text: str
) -> None:
    with pytest.raises(InvalidRequestError, match=text) as caught:
        GRIDS.plan(modality, num_rows, grid)
    assert caught.value.reason == "INVALID_EMBEDDING"


def test_the_planner_is_read_from_the_configuration() -> None:
    qwen = {
        "model_type": "qwen2_5_vl",
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_config": {"spatial_merge_size": 2, "temporal_patch_size": 3},
    }
    omni = {
        "model_type": "qwen2_5_omni_thinker",
        "image_token_index": 3,
        "video_token_index": 4,
        "audio_token_index": 5,
        "vision_config": qwen["vision_config"],
    }
    llava = {"model_type": "llava", "image_token_index": 5}

    planner = RowPlanner.of(family_of(qwen), qwen)
    assert (planner.merge_size, planner.frames_per_patch) == (2, 3)
    assert planner.token_ids[Modality.IMAGE] == 3
    omni_planner = RowPlanner.of(family_of(omni), omni)
    assert (omni_planner.merge_size, omni_planner.frames_per_patch) == (2, 3)
    assert RowPlanner.of(family_of(llava), llava) == RowPlanner({Modality.IMAGE: 5}, 0)
