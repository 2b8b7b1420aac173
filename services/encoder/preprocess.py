"""Say what every modality's preprocessor does: plan an item, then make the tower's inputs of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import torch

    from chiasm.common.media import MediaLayout, Modality, ProcessingOptions
    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.memory_file import MemoryFile


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Bounds of single items, checked by their headers and again while they are decoded.

    Attributes:
        max_image_pixels: Most pixels of a picture, or of one frame of a video.
        max_video_frames: Most frames of a video that are looked at.
        max_video_pixels: Most pixels of these together.
        max_source_frames: Most frames that a video may hold.
        max_video_duration_s: Longest that a video may run, in seconds.
        max_audio_duration_s: Most seconds of a sound clip.
    """

    max_image_pixels: int = 33_000_000
    max_video_frames: int = 768
    max_video_pixels: int = 256_000_000
    max_source_frames: int = 250_000
    max_video_duration_s: float = 3600.0
    max_audio_duration_s: int = 600


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an item is decoded.

    Attributes:
        task: What the decoder is told.
        shape: Dimensions of the decoded media.
        element_bytes: Bytes of one element.
    """

    task: bytes
    shape: tuple[int, ...]
    element_bytes: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded media."""
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """An item whose header was read.

    Attributes:
        modality: Kind of the item.
        source: The file's bytes.
        options: The client's wishes.
        layout: How it will stand in the prompt.
        num_pixels: What it costs: pixels of the larger of the decoded and the resized media, all
            frames of a video together; sound is charged an equivalent.
        num_tower_pixels: Pixels of the resized media alone, which the tower sees.
        decoding: How it is decoded.
    """

    modality: Modality
    source: MemoryFile
    options: ProcessingOptions
    layout: MediaLayout
    num_pixels: int
    num_tower_pixels: int
    decoding: Decoding


@dataclass(frozen=True, slots=True)
class TowerInputs:
    """What one item looks like to the tower.

    Attributes:
        modality: Kind of the item; decides which features call is made.
        tensors: Arguments of the model's features call by name; the first dimension counts
            patches, pictures or clips, so that items are batched by concatenation.
        num_pixels: What the item costs in a batch: pixels that the tower sees.
        num_rows: Rows that the plan promises.
    """

    modality: Modality
    tensors: Mapping[str, torch.Tensor]
    num_pixels: int
    num_rows: int

    def joins(self, other: TowerInputs) -> bool:
        """Return whether the two can be concatenated: same modality, same dimensions but one."""
        return self.modality is other.modality and _trailing(self.tensors) == _trailing(
            other.tensors
        )


class Preprocessor(Protocol):
    """The checkpoint's own processor of one modality and the planner that foretells its results."""

    @property
    def sample(self) -> bytes:
        """A small file of this modality; the warm-up encodes it."""
        ...

    @property
    def settings(self) -> Mapping[str, object]:
        """Everything that changes what is made of an item; part of the fingerprint."""
        ...

    async def plan(
        self, decoder: DecodePool, source: MemoryFile, options: ProcessingOptions
    ) -> PlannedItem:
        """Read the header of an item and plan it; nothing is decoded.

        Raises:
            InvalidRequestError: It cannot be processed.
            TooLargeError: It is over a limit.
            OverloadedError: No decoder was free in time.
        """
        ...

    def run(self, item: PlannedItem, media: memoryview) -> TowerInputs:
        """Preprocess a decoded item; takes milliseconds per megapixel, so use a thread.

        Raises:
            InvalidRequestError: The processor cannot process it.
        """
        ...


def plain(settings: Mapping[str, object]) -> Mapping[str, object]:
    """Return ``settings`` with mappings of every kind turned into dictionaries."""
    return {
        key: dict(cast("Mapping[str, object]", value)) if isinstance(value, Mapping) else value
        for key, value in settings.items()
    }


def _trailing(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
