"""Describe a model family: the facts in which checkpoints of different kinds differ."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families.reading import read_int
from chiasm.common.media import Modality

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chiasm.common.media import MediaLayout, ProcessingOptions

MAX_ASPECT_RATIO = 200

_PLACEHOLDER_KEYS = {
    Modality.IMAGE: ("image_token_id", "image_token_index"),
    Modality.VIDEO: ("video_token_id", "video_token_index"),
    Modality.AUDIO: ("audio_token_id", "audio_token_index"),
}


class PositionScheme(enum.Enum):
    """How positions of a prompt with media are numbered."""

    LINEAR = "linear"
    """One number per token, counting up."""
    MROPE = "mrope"
    """Three numbers per token: time, row and column of the merged patch grid."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What an image becomes, known before its pixels are.

    Attributes:
        layout: Expansion of the item's placeholder, and its grid if the family has one.
        num_pixels: Pixels of the resized image, before any crop; what preprocessing costs.
    """

    layout: MediaLayout
    num_pixels: int


class ImagePlanner(Protocol):
    """Plans images of one checkpoint from their size."""

    def plan(self, height: int, width: int, options: ProcessingOptions) -> ImagePlan:
        """Return the plan of an image of ``height`` times ``width`` pixels.

        Raises:
            InvalidRequestError: The family cannot process an image of this shape.
        """
        ...

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return the ``size`` argument that makes the checkpoint's processor follow ``options``.

        ``None`` leaves the processor's own value. Client values are clamped by the checkpoint's.
        """
        ...


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about one kind of checkpoint.

    Attributes:
        name: Word used in logs.
        model_types: Values of ``model_type`` in ``config.json`` that belong to the family.
        positions: How the language model numbers positions.
        make_image_planner: Builds the planner from ``config.json`` and the image processor's
            attributes (``to_dict()``, so that defaults are filled in); ``None`` for families that
            take no pictures.
    """

    name: str
    model_types: tuple[str, ...]
    positions: PositionScheme
    make_image_planner: (
        Callable[[Mapping[str, object], Mapping[str, object]], ImagePlanner] | None
    ) = None

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Kinds of media that can be encoded."""
        makers = {Modality.IMAGE: self.make_image_planner}
        return tuple(modality for modality, maker in makers.items() if maker is not None)

    def placeholder_token_id(self, config: Mapping[str, object], modality: Modality) -> int:
        """Return the id of the token that stands for one item before its expansion.

        Raises:
            UnsupportedModelError: ``config`` does not name the token.
        """
        return read_int(config, *_PLACEHOLDER_KEYS[modality])


def check_aspect_ratio(height: int, width: int) -> None:
    """Raise ``InvalidRequestError`` for a shape that resizing would stretch without bound."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequestError(
            f"Failed to load image: the aspect ratio of {width}x{height} pixels is over the"
            f" maximum of {MAX_ASPECT_RATIO}.",
            reason="INVALID_MEDIA",
        )
