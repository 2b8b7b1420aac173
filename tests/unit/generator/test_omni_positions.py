"""Positions of prompts with pictures, videos and sound against the thinker of Qwen2.5-Omni."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.common import torchvision_shim
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

MERGE = 2
PER_SECOND = 25
TEXT, VISION_START, VISION_END, AUDIO_START, AUDIO_END = 1, 2, 3, 4, 5
TOKENS = {Modality.IMAGE: 6, Modality.VIDEO: 7, Modality.AUDIO: 8}
_SIDES = st.integers(1, 4)

Item = tuple[Modality, tuple[int, int, int], int]
"""Kind, merged patches by time, row and column (of sound: frames, 1, 1), and text behind it."""


def _layout(modality: Modality, grid: tuple[int, int, int]) -> MediaLayout:
    if modality is Modality.AUDIO:
        num_tokens = ((grid[0] - 1) // 2 + 1 - 2) // 2 + 1
        return MediaLayout((TokenRun(TOKENS[modality], num_tokens, is_embedding=True),))
    run = TokenRun(TOKENS[modality], grid[0] * grid[1] * grid[2], is_embedding=True)
    times = tuple(float(patch) for patch in range(grid[0])) if modality is Modality.VIDEO else ()
    patches = PatchGrid(grid[0], grid[1] * MERGE, grid[2] * MERGE)
    return MediaLayout((run,), patches, MERGE, timestamps_s=times)


def _lay_out(first: int, items: Sequence[Item]) -> tuple[list[int], list[MediaSpan]]:
    """Return a prompt's tokens, with the marks around media, and its spans."""
    tokens, spans = [TEXT] * first, []
    for modality, grid, text in items:
        is_sound = modality is Modality.AUDIO
        tokens.append(AUDIO_START if is_sound else VISION_START)
        layout = _layout(modality, grid)
        spec = TensorSpec(TensorRole.SPLICE, DataType.FLOAT32, (layout.num_tokens, 4))
        ref = EmbeddingRef(b"e" * 32, b"f" * 32, modality, (spec,))
        spans.append(MediaSpan(len(tokens), ref, layout, is_ready=True))
        tokens += [*layout.expand(), AUDIO_END if is_sound else VISION_END, *[TEXT] * text]
    return tokens, spans


def _reference(tokens: list[int], items: Sequence[Item]) -> tuple[torch.Tensor, int]:
    """Return positions and delta as transformers computes them, without any weights."""
    torchvision_shim.install()
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
        Qwen2_5OmniPreTrainedModelForConditionalGeneration as Omni,
    )

    def grids_of(modality: Modality) -> torch.Tensor | None:
        grids = [(g[0], g[1] * MERGE, g[2] * MERGE) for kind, g, _ in items if kind is modality]
        return torch.tensor(grids) if grids else None

    config = types.SimpleNamespace(
        image_token_id=TOKENS[Modality.IMAGE],
        video_token_id=TOKENS[Modality.VIDEO],
        audio_token_id=TOKENS[Modality.AUDIO],
        vision_start_token_id=VISION_START,
        audio_start_token_id=AUDIO_START,
        position_id_per_seconds=PER_SECOND,
        seconds_per_chunk=2,
    )
    stub = types.SimpleNamespace(config=config, spatial_merge_size=MERGE)
    stub.get_llm_pos_ids_for_vision = types.MethodType(Omni.get_llm_pos_ids_for_vision, stub)
    # Called without a model, which its types do not foresee.
    number: Callable[..., tuple[torch.Tensor, torch.Tensor]] = Omni.get_rope_index
    positions, delta = number(
        stub,
        torch.tensor([tokens]),
        image_grid_thw=grids_of(Modality.IMAGE),
        video_grid_thw=grids_of(Modality.VIDEO),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        audio_seqlens=torch.tensor([g[0] for kind, g, _ in items if kind is Modality.AUDIO]),
        second_per_grids=torch.ones(len(items)),
    )
    return positions[:, 0], int(delta)


_ITEMS = st.one_of(
    st.tuples(st.just(Modality.IMAGE), st.tuples(st.just(1), _SIDES, _SIDES), st.integers(0, 5)),
    st.tuples(st.just(Modality.VIDEO), st.tuples(_SIDES, _SIDES, _SIDES), st.integers(0, 5)),
    st.tuples(
        st.just(Modality.AUDIO),
        st.tuples(st.integers(3, 99), st.just(1), st.just(1)),
        st.integers(0, 5),
    ),
)


@settings(max_examples=80, deadline=None)
@given(first=st.integers(1, 6), items=st.lists(_ITEMS, max_size=5))
def test_positions_equal_those_of_transformers(first: int, items: list[Item]) -> None:
    tokens, spans = _lay_out(first, items)
    expected, delta = _reference(tokens, items)

    positions = compute_positions(PositionScheme.TMROPE, len(tokens), spans, float(PER_SECOND))

    assert np.array_equal(positions.prompt, expected.numpy())
    assert positions.delta == delta


def test_text_behind_a_video_goes_on_after_its_last_time() -> None:
    tokens, spans = _lay_out(1, [(Modality.VIDEO, (3, 1, 1), 1)])

    by_time = compute_positions(PositionScheme.TMROPE, len(tokens), spans, float(PER_SECOND))
    by_size = compute_positions(PositionScheme.MROPE, len(tokens), spans, float(PER_SECOND))

    assert by_time.prompt[:, -1].tolist() == [2 + 2 * PER_SECOND + 2] * 3
    assert by_size.prompt[:, -1].tolist() == [4] * 3
