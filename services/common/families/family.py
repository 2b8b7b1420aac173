"""Describe a model family: the facts in which checkpoints of different kinds differ."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from chiasm.common.errors import InvalidRequestError
from chiasm.common.families.reading import read_int
from chiasm.common.media import MediaLayout, Modality, Placeholder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chiasm.common.media import PatchGrid, ProcessingOptions, TokenRun

MAX_ASPECT_RATIO = 200

_PLACEHOLDER_KEYS: Mapping[Modality, tuple[str, ...]] = {
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
    TMROPE = "tmrope"
    """The same, and what follows a video goes on behind its last time too."""


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """What an image or a video becomes, known before its pixels are.

    Attributes:
        layout: Expansion of the item's placeholder, and its grid if the family has one.
        num_pixels: Pixels of the resized image, before any crop, or of all resized frames; what
            preprocessing costs.
        pieces: The runs of ``layout`` with texts between them, which the checkpoint's tokenizer
            makes runs of, too; empty if there are none.
    """

    layout: MediaLayout
    num_pixels: int
    pieces: tuple[str | TokenRun, ...] = ()


class ImagePlanner(Protocol):
    """Plans images of one checkpoint from their size."""

    def plan(self, height: int, width: int, options: ProcessingOptions) -> VisualPlan:
        """Return the plan of an image of ``height`` times ``width`` pixels.

        Raises:
            InvalidRequestError: The family cannot process an image of this shape.
        """
        ...

    def processor_arguments(
        self, height: int, width: int, options: ProcessingOptions
    ) -> Mapping[str, object]:
        """Return the arguments that make the checkpoint's processor follow the plan.

        What is not among them has the processor's own value. Client values are clamped by the
        checkpoint's.
        """
        ...


@dataclass(frozen=True, slots=True)
class SampledVideo:
    """The frames of a video that are looked at.

    Attributes:
        num_frames: How many there are, at least 1.
        height: Rows of pixels of each.
        width: Columns of pixels of each.
        fps: How many of them make a second of the video.
        times_s: When each of them is shown, in seconds.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    times_s: tuple[float, ...] = ()


class VideoPlanner(Protocol):
    """Plans videos of one checkpoint from the size and the number of their sampled frames."""

    def plan(self, video: SampledVideo, options: ProcessingOptions) -> VisualPlan:
        """Return the plan of a video.

        Raises:
            InvalidRequestError: The family cannot process frames of this shape.
        """
        ...

    def processor_size(self, options: ProcessingOptions) -> Mapping[str, int] | None:
        """Return the ``size`` argument that makes the checkpoint's processor follow ``options``.

        ``None`` leaves the processor's own value. Client values are clamped by the checkpoint's.
        """
        ...


@dataclass(frozen=True, slots=True)
class AudioPlan:
    """What an audio clip becomes, known before it is decoded.

    Attributes:
        layout: Expansion of the item's placeholder, and the frames of features that hold its sound.
        num_positions: Positions that the tower computes, padding included; what the clip costs.
    """

    layout: MediaLayout
    num_positions: int


class AudioPlanner(Protocol):
    """Plans audio clips of one checkpoint from their length."""

    @property
    def sampling_rate(self) -> int:
        """Samples a second that the tower hears, in hertz."""
        ...

    @property
    def packs_frames(self) -> bool:
        """Whether clips are batched by their frames, one clip behind the other; else padded."""
        ...

    def plan(self, num_samples: int) -> AudioPlan:
        """Return the plan of a clip of ``num_samples`` samples at ``sampling_rate``.

        Raises:
            InvalidRequestError: The clip is too short to become a token.
            TooLargeError: The tower would not hear all of it.
        """
        ...

    def padded_length(self, num_samples: int) -> int:
        """Return the samples to which the feature extractor pads a clip with silence."""
        ...


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about one kind of checkpoint.

    Attributes:
        name: Word used in logs.
        model_types: Values of ``model_type`` in ``config.json`` that belong to the family.
        tower_types: Values of it in ``vision_config``, for families that share a ``model_type``
            with another; empty if the towers of a family can be of any type.
        positions: How the language model numbers positions.
        make_image_planner: Builds the planner from ``config.json`` and the image processor's
            attributes (``to_dict()``, so that defaults are filled in); ``None`` for families that
            take no pictures.
        make_video_planner: The same for videos, from the video processor's attributes.
        make_audio_planner: The same from ``config.json`` and the feature extractor's attributes;
            ``None`` for families that hear nothing.
        read_positions_per_s: Returns how many time positions a second of video takes, from
            ``config.json``; ``None`` where every temporal patch takes one.
        placeholder_keys: Names in ``config.json`` of the token that stands for one item before its
            expansion, by modality.
        processor_tokens: Tokens that planners need and ``config.json`` does not name: their names
            in the processor's configuration, and what they are where it does not say. Their ids
            stand in the ``config`` of planners under these names with ``_id``.
        placeholder_margin: Text that the family's processor puts before and behind each of them.
        lay_out_rows: Returns how rows that were not made from media here, and have no grid, stand
            in the prompt, from ``config.json`` and their run.
        joins_any_size: Whether pictures of different sizes are encoded in one forward: the values
            of each are then flattened for the features call.
        read_merge_size: Returns from ``config.json`` how many patches are a token along each side;
            0 if media have no patch grid.
        split_rows: Returns the runs in which the rows of an item stand in the prompt, from
            ``config.json``, their run and their grid.
        count_group_tokens: Returns from ``config.json`` how many rows every image has, if they
            attend to one another both ways; 0 if every token sees only those before it.
        count_deepstack_levels: Returns from ``config.json`` how many tensors of an embedding are
            added behind the first layers of the language model.
    """

    name: str
    model_types: tuple[str, ...]
    positions: PositionScheme
    tower_types: tuple[str, ...] = ()
    make_image_planner: (
        Callable[[Mapping[str, object], Mapping[str, object]], ImagePlanner] | None
    ) = None
    make_video_planner: (
        Callable[[Mapping[str, object], Mapping[str, object]], VideoPlanner] | None
    ) = None
    make_audio_planner: (
        Callable[[Mapping[str, object], Mapping[str, object]], AudioPlanner] | None
    ) = None
    read_positions_per_s: Callable[[Mapping[str, object]], float | None] = lambda config: None
    placeholder_keys: Mapping[Modality, tuple[str, ...]] = field(
        default_factory=lambda: _PLACEHOLDER_KEYS
    )
    processor_tokens: Mapping[str, str] = field(default_factory=dict)
    placeholder_margin: str = ""
    lay_out_rows: Callable[[Mapping[str, object], TokenRun], MediaLayout] = lambda config, rows: (
        MediaLayout((rows,))
    )
    joins_any_size: bool = False
    read_merge_size: Callable[[Mapping[str, object]], int] = lambda config: 0
    split_rows: Callable[[Mapping[str, object], TokenRun, PatchGrid], tuple[TokenRun, ...]] = (
        lambda config, rows, grid: (rows,)
    )
    count_group_tokens: Callable[[Mapping[str, object]], int] = lambda config: 0
    count_deepstack_levels: Callable[[Mapping[str, object]], int] = lambda config: 0

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Kinds of media that can be encoded."""
        makers: Mapping[Modality, object | None] = {
            Modality.IMAGE: self.make_image_planner,
            Modality.VIDEO: self.make_video_planner,
            Modality.AUDIO: self.make_audio_planner,
        }
        return tuple(modality for modality, maker in makers.items() if maker is not None)

    def placeholder_token_id(self, config: Mapping[str, object], modality: Modality) -> int:
        """Return the id of the token that stands for one item before its expansion.

        Raises:
            UnsupportedModelError: ``config`` does not name the token.
        """
        return read_int(config, *self.placeholder_keys[modality])

    def row_token_id(self, config: Mapping[str, object], modality: Modality) -> int:
        """Return the id of the token that stands at every row of an item; raises as above."""
        return read_int(config, *_PLACEHOLDER_KEYS[modality])

    def placeholder(self, config: Mapping[str, object], modality: Modality) -> Placeholder:
        """Return what stands for one item in a rendered prompt; raises as above."""
        token_id = self.placeholder_token_id(config, modality)
        return Placeholder(token_id, self.placeholder_margin)


def check_aspect_ratio(height: int, width: int, modality: Modality) -> None:
    """Raise ``InvalidRequestError`` for a shape that resizing would stretch without bound."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequestError(
            f"Failed to load {modality.value}: the aspect ratio of {width}x{height} pixels is over"
            f" the maximum of {MAX_ASPECT_RATIO}.",
            reason="INVALID_MEDIA",
        )
