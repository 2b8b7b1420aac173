"""M-RoPE positions against transformers, for many layouts."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.common import torchvision_shim
from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import PositionScheme
from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    PatchGrid,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.generator.model.positions import compute_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMAGE_TOKEN = 7
MERGE = 2

Grid = tuple[int, int]


def _span(offset: int, grid: Grid, wrapped: bool = False) -> MediaSpan:
    """Return an image of ``grid`` merged patches, between two text tokens if ``wrapped``."""
    count = grid[0] * grid[1]
    runs = [TokenRun(IMAGE_TOKEN, count, is_embedding=True)]
    if wrapped:
        runs = [TokenRun(1, 1, is_embedding=False), *runs, TokenRun(2, 1, is_embedding=False)]
    layout = MediaLayout(tuple(runs), PatchGrid(1, grid[0] * MERGE, grid[1] * MERGE), MERGE)
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (count, 4))
    return MediaSpan(
        offset, EmbeddingRef(b"e" * 32, b"f" * 32, Modality.IMAGE, (spec,)), layout, True
    )


def _lay_out(texts: Sequence[int], grids: Sequence[Grid]) -> tuple[int, list[MediaSpan]]:
    """Return the length of a prompt of texts with images between them, and its spans."""
    spans, offset = [], texts[0]
    for grid, text in zip(grids, texts[1:], strict=True):
        spans.append(_span(offset, grid))
        offset = spans[-1].end + text
    return offset, spans


def _reference(num_tokens: int, spans: Sequence[MediaSpan]) -> tuple[torch.Tensor, int]:
    """Return positions and delta as transformers computes them, without any weights."""
    torchvision_shim.install()
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    kinds = torch.zeros(1, num_tokens, dtype=torch.int)
    for span in spans:
        kinds[0, span.offset : span.end] = 1
    grids = [(1, s.layout.grid.h, s.layout.grid.w) for s in spans if s.layout.grid is not None]
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=MERGE))
    stub = types.SimpleNamespace(config=config)
    stub.get_vision_position_ids = types.MethodType(Qwen2VLModel.get_vision_position_ids, stub)
    # Called without a model, which its types do not foresee.
    number: Callable[..., tuple[torch.Tensor, torch.Tensor]] = Qwen2VLModel.get_rope_index
    positions, delta = number(
        stub,
        torch.zeros(1, num_tokens, dtype=torch.long),
        mm_token_type_ids=kinds,
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    return positions[:, 0], int(delta)


def _video_span(offset: int, grid: tuple[int, int, int], interval_s: float) -> MediaSpan:
    """Return a video of ``grid`` temporal and merged patches, ``interval_s`` seconds apart."""
    times = tuple(patch * interval_s for patch in range(grid[0]))
    count = grid[0] * grid[1] * grid[2]
    layout = MediaLayout(
        (TokenRun(IMAGE_TOKEN, count, is_embedding=True),),
        PatchGrid(grid[0], grid[1] * MERGE, grid[2] * MERGE),
        MERGE,
        timestamps_s=times,
    )
    spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (count, 4))
    ref = EmbeddingRef(b"e" * 32, b"f" * 32, Modality.VIDEO, (spec,))
    return MediaSpan(offset, ref, layout, True)


def _video_reference(
    num_tokens: int, spans: Sequence[MediaSpan], intervals: Sequence[float], tokens_per_s: int
) -> tuple[torch.Tensor, int]:
    """Return positions and delta as transformers computes them for videos of Qwen2.5-VL."""
    torchvision_shim.install()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    kinds = torch.zeros(1, num_tokens, dtype=torch.int)
    for span in spans:
        kinds[0, span.offset : span.end] = 2
    grids = [[s.layout.grid.t, s.layout.grid.h, s.layout.grid.w] for s in spans if s.layout.grid]
    vision = types.SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=tokens_per_s)
    stub = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision))
    stub.get_vision_position_ids = types.MethodType(Qwen2_5_VLModel.get_vision_position_ids, stub)
    # Called without a model, which its types do not foresee.
    number: Callable[..., tuple[torch.Tensor, torch.Tensor]] = Qwen2_5_VLModel.get_rope_index
    positions, delta = number(
        stub,
        torch.zeros(1, num_tokens, dtype=torch.long),
        mm_token_type_ids=kinds,
        video_grid_thw=torch.tensor(grids),
        second_per_grid_ts=torch.tensor(intervals),
    )
    return positions[:, 0], int(delta)


_SIDES = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(1, 9),
    items=st.lists(st.tuples(st.tuples(_SIDES, _SIDES), st.integers(1, 9)), max_size=4),
)
def test_positions_equal_those_of_transformers(first: int, items: list[tuple[Grid, int]]) -> None:
    texts = [first, *(text for _, text in items)]
    num_tokens, spans = _lay_out(texts, [grid for grid, _ in items])
    expected, delta = _reference(num_tokens, spans)

    positions = compute_positions(PositionScheme.MROPE, num_tokens, spans)

    assert np.array_equal(positions.prompt, expected.numpy())
    assert positions.delta == delta


@settings(max_examples=60, deadline=None)
@given(
    tokens_per_s=st.sampled_from([2, 4, 25]),
    videos=st.lists(
        st.tuples(
            st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3)),
            st.floats(0.0625, 20.0, width=32),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_the_time_of_videos_follows_the_clock_as_in_transformers(
    tokens_per_s: int, videos: list[tuple[tuple[int, int, int], float]]
) -> None:
    spans: list[MediaSpan] = []
    offset = 3
    for grid, interval_s in videos:
        spans.append(_video_span(offset, grid, interval_s))
        offset = spans[-1].end + 2
    intervals = [interval_s for _, interval_s in videos]
    expected, delta = _video_reference(offset, spans, intervals, tokens_per_s)

    positions = compute_positions(PositionScheme.MROPE, offset, spans, float(tokens_per_s))

    assert np.array_equal(positions.prompt, expected.numpy())
    assert positions.delta == delta


def test_a_video_may_be_written_patch_by_patch_with_text_between() -> None:
    video = _video_span(0, (2, 1, 2), 1.0)
    text, rows = TokenRun(1, 2, is_embedding=False), TokenRun(IMAGE_TOKEN, 2, is_embedding=True)
    layout = replace(video.layout, runs=(text, rows, text, rows))

    positions = compute_positions(PositionScheme.MROPE, 9, [replace(video, layout=layout)])

    assert positions.prompt.tolist() == [
        [0, 1, 2, 2, 4, 5, 6, 6, 8],
        [0, 1, 2, 2, 4, 5, 6, 6, 8],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]


def test_without_a_clock_every_temporal_patch_takes_one_position() -> None:
    positions = compute_positions(PositionScheme.MROPE, 4, [_video_span(0, (3, 1, 1), 7.0)])

    assert positions.prompt.tolist() == [[0, 1, 2, 1], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_prompt_may_begin_and_end_with_an_image() -> None:
    spans = [_span(0, (2, 3))]

    positions = compute_positions(PositionScheme.MROPE, 6, spans)

    assert positions.prompt.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert positions.delta == -3


def test_adjacent_images_follow_each_other() -> None:
    spans = [_span(0, (1, 2)), _span(2, (2, 1))]

    positions = compute_positions(PositionScheme.MROPE, 5, spans)

    assert positions.prompt.tolist() == [[0, 0, 2, 2, 4], [0, 0, 2, 3, 4], [0, 1, 2, 2, 4]]


def test_wrapper_tokens_of_an_expansion_count_as_text() -> None:
    spans = [_span(0, (1, 2), wrapped=True)]

    positions = compute_positions(PositionScheme.MROPE, 5, spans)

    assert positions.prompt.tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]


def test_output_continues_at_its_index_plus_delta_on_every_row() -> None:
    num_tokens, spans = _lay_out([2, 3], [(2, 2)])
    positions = compute_positions(PositionScheme.MROPE, num_tokens, spans)

    output = positions.of(num_tokens, num_tokens + 2)

    first = num_tokens + positions.delta
    assert output.tolist() == [[first, first + 1]] * 3
    assert positions.of(1, num_tokens + 1)[0].tolist() == [1, 2, 2, 2, 2, 4, 5, 6, 7]


def test_linear_positions_count_up_over_images() -> None:
    num_tokens, spans = _lay_out([2, 3], [(2, 2)])

    positions = compute_positions(PositionScheme.LINEAR, num_tokens, spans)

    assert positions.prompt.tolist() == [list(range(num_tokens))]
    assert positions.of(num_tokens, num_tokens + 1).tolist() == [[num_tokens]]


@pytest.mark.parametrize("grid", [None, PatchGrid(1, 2, 2)])
def test_layout_that_does_not_fit_its_grid_is_refused(grid: PatchGrid | None) -> None:
    span = _span(0, (2, 3))
    layout = MediaLayout(span.layout.runs, grid, MERGE)

    with pytest.raises(InvalidRequestError) as refused:
        compute_positions(PositionScheme.MROPE, 6, [MediaSpan(0, span.ref, layout, True)])

    assert (refused.value.reason, refused.value.param) == ("LAYOUT_MISMATCH", "spans[0].layout")
