"""What the operator wishes for the processing of media, and how clients' wishes meet it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chiasm.common.limits import clamp
from chiasm.common.media import ProcessingOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.limits import Number
    from chiasm.common.media import Modality


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """Processing options of all requests, and whether ready-made embeddings are taken.

    Attributes:
        options: Options of each modality. ``max_pixels``, ``fps`` and ``num_frames`` are limits
            that clients may lower; the others are defaults that clients may change.
        takes_embeddings: Whether a request may hold ready-made embeddings.
    """

    options: Mapping[Modality, ProcessingOptions] = field(default_factory=dict)
    takes_embeddings: bool = True

    def merge(self, modality: Modality, wishes: ProcessingOptions) -> ProcessingOptions:
        """Return the options for one item of a client; equal results are equal for the cache."""
        own = self.options.get(modality)
        if own is None:
            return wishes
        return ProcessingOptions(
            min_pixels=own.min_pixels if wishes.min_pixels is None else wishes.min_pixels,
            max_pixels=_lower(own.max_pixels, wishes.max_pixels),
            fps=_lower(own.fps, wishes.fps),
            num_frames=_lower(own.num_frames, wishes.num_frames),
            background_rgb=(
                own.background_rgb if wishes.background_rgb is None else wishes.background_rgb
            ),
        )


def _lower(limit: Number | None, wish: Number | None) -> Number | None:
    return wish if limit is None else clamp(limit, wish)
