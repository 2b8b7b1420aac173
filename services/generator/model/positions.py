"""Number the positions of a prompt with media.

Text counts up. A media item under M-RoPE is a box of merged patches: its tokens are numbered by
time, row and column from the position that the item starts at, and the text behind it goes on
after the longer side of the box. The time of a video's patches counts up, or follows the clock.
Under TMRoPE the text behind a video also goes on after its last time. Sound counts up as text does.

Source: M-RoPE, Wang et al. 2024, "Qwen2-VL", section 2.1; TMRoPE, Xu et al. 2025, "Qwen2.5-Omni".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families import PositionScheme
from chiasm.common.media import Modality

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.media import MediaLayout, MediaSpan

NUM_MROPE_ROWS = 3


def count_position_rows(scheme: PositionScheme) -> int:
    """Return the numbers that a token's position has under ``scheme``."""
    return 1 if scheme is PositionScheme.LINEAR else NUM_MROPE_ROWS


@dataclass(frozen=True, slots=True, eq=False)
class PromptPositions:
    """Positions of the tokens of one sequence.

    Attributes:
        prompt: Positions of the prompt. [num_rows, num_prompt_tokens], int64; one row for linear
            positions, three (time, row, column) for M-RoPE.
        delta: What an output token's index is off its position on every row.
    """

    prompt: np.ndarray
    delta: int

    @property
    def num_rows(self) -> int:
        """Numbers per token."""
        return len(self.prompt)

    def of(self, start: int, stop: int) -> np.ndarray:
        """Return the positions of tokens ``start`` to ``stop`` of prompt and output.

        Returns:
            [num_rows, stop - start], int64.
        """
        num_prompt_tokens = self.prompt.shape[1]
        if stop <= num_prompt_tokens:
            return self.prompt[:, start:stop]
        first_output = max(start, num_prompt_tokens)
        output = np.arange(first_output, stop) + self.delta
        output = np.broadcast_to(output, (self.num_rows, len(output)))
        return np.concatenate([self.prompt[:, start:], output], axis=1)


def compute_positions(
    scheme: PositionScheme,
    num_tokens: int,
    spans: Sequence[MediaSpan],
    positions_per_s: float | None = None,
) -> PromptPositions:
    """Number the positions of a prompt.

    Args:
        scheme: How the family numbers positions.
        num_tokens: Tokens of the prompt, placeholders expanded.
        spans: Media items by ascending offset, within the prompt, not overlapping.
        positions_per_s: Time positions that a second of video takes; ``None`` if every temporal
            patch takes one.

    Returns:
        The positions of the prompt and of what will follow it.

    Raises:
        InvalidRequestError: A layout has no grid, or not one token per merged patch, although
            the scheme needs it (reason ``LAYOUT_MISMATCH``).
    """
    if scheme is PositionScheme.LINEAR:
        return PromptPositions(np.arange(num_tokens)[None], delta=0)
    pieces: list[np.ndarray] = []
    index = position = 0
    for number, span in enumerate(spans):
        if span.ref.modality is Modality.AUDIO:
            continue  # sound counts up as text does
        pieces.append(_count_up(position, span.offset - index))
        position += span.offset - index
        per_patch = _positions_per_patch(span.layout, positions_per_s)
        param = f"spans[{number}].layout"
        box, position = _number_layout(span.layout, position, per_patch, param)
        if scheme is PositionScheme.TMROPE:
            position = max(position, int(box.max()) + 1)
        pieces.append(box)
        index = span.end
    pieces.append(_count_up(position, num_tokens - index))
    prompt = np.concatenate(pieces, axis=1)
    return PromptPositions(prompt, delta=int(prompt.max()) + 1 - num_tokens)


def _positions_per_patch(layout: MediaLayout, positions_per_s: float | None) -> np.float32:
    """Return the time positions between two temporal patches, in the precision of transformers."""
    if positions_per_s is None or len(layout.timestamps_s) < 2:
        return np.float32(1)
    interval_s = layout.timestamps_s[1] - layout.timestamps_s[0]
    return np.float32(positions_per_s) * np.float32(interval_s)


def _number_layout(
    layout: MediaLayout, position: int, per_patch: np.float32, param: str
) -> tuple[np.ndarray, int]:
    """Return the positions of one item's expansion and the position behind it."""
    shape = _box_shape(layout, param)
    pieces: list[np.ndarray] = []
    for run in layout.runs:
        if run.is_embedding:
            box = np.indices(shape).reshape(NUM_MROPE_ROWS, -1)
            box[0] = box[0].astype(np.float32) * per_patch
            pieces.append(box + position)
            position += max(shape[1], shape[2])
        else:
            pieces.append(_count_up(position, run.count))
            position += run.count
    return np.concatenate(pieces, axis=1), position


def _box_shape(layout: MediaLayout, param: str) -> tuple[int, int, int]:
    """Return what one run of embedding tokens is: the whole grid, or one temporal patch of it."""
    grid, merge = layout.grid, layout.spatial_merge_size
    counts = [run.count for run in layout.runs if run.is_embedding]
    if grid is None or not counts:
        raise InvalidRequestError(
            "The model needs a grid and embedding tokens for each media item.",
            reason="LAYOUT_MISMATCH",
            param=param,
        )
    rows, columns = grid.h // merge, grid.w // merge
    if counts == [grid.t * rows * columns]:
        return grid.t, rows, columns
    if counts == [rows * columns] * grid.t:
        return 1, rows, columns
    raise InvalidRequestError(
        f"A grid of {grid.t} x {grid.h} x {grid.w} patches merged by {merge} does not have"
        f" {sum(counts)} tokens in {len(counts)} runs.",
        reason="LAYOUT_MISMATCH",
        param=param,
    )


def _count_up(position: int, num_tokens: int) -> np.ndarray:
    row = np.arange(position, position + num_tokens)
    return np.broadcast_to(row, (NUM_MROPE_ROWS, num_tokens))
