"""Turn pixels into the tower's inputs with the checkpoint's own image processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch

from chiasm.common import torchvision_shim

_HAS_TORCHVISION = torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

from chiasm.common.errors import InvalidRequestError  # noqa: E402
from chiasm.encoder.decode_wire import NUM_CHANNELS  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.common.families import Family, ImagePlanner
    from chiasm.common.media import ProcessingOptions
    from chiasm.encoder.pixels import Pixels


@dataclass(frozen=True, slots=True)
class TowerInputs:
    """What one item looks like to the tower.

    Attributes:
        tensors: Arguments of the model's features call by name; the first dimension counts
            patches or images, so that items are batched by concatenation.
        num_pixels: Pixels of the planned image; what the item costs in a batch.
        num_rows: Rows that the plan promises.
    """

    tensors: Mapping[str, torch.Tensor]
    num_pixels: int
    num_rows: int


class ImageProcessor(Protocol):
    """What is used of a transformers image processor."""

    def __call__(self, images: list[np.ndarray], **kwargs: object) -> Mapping[str, object]:
        """Preprocess pictures; keyword arguments override the processor's settings."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return every setting."""
        ...


class ImagePreprocessor:
    """The checkpoint's image processor and the planner that foretells its results.

    Attributes:
        planner: Plans images by their size.
        backend: ``torchvision`` or ``pil``; they give different values, so it is part of the
            fingerprint.
    """

    def __init__(self, processor: ImageProcessor, planner: ImagePlanner, backend: str) -> None:
        self._processor = processor
        self.planner = planner
        self.backend = backend

    @classmethod
    def load(
        cls, model_path: Path, family: Family, config: Mapping[str, object]
    ) -> ImagePreprocessor:
        """Load the processor of a checkpoint.

        Args:
            model_path: Directory of the checkpoint.
            family: Its family.
            config: Its ``config.json``.

        Raises:
            OSError: There is no processor configuration.
            UnsupportedModelError: The family cannot plan with this processor.
        """
        backend = "torchvision" if _HAS_TORCHVISION else "pil"
        processor: ImageProcessor = transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            model_path, backend=backend
        )
        planner = family.make_image_planner(config, _plain(processor.to_dict()))
        return cls(processor, planner, backend)

    @property
    def settings(self) -> Mapping[str, object]:
        """Every setting of the processor, in plain types."""
        return _plain(self._processor.to_dict())

    def run(self, pixels: Pixels, options: ProcessingOptions) -> TowerInputs:
        """Preprocess one picture; takes milliseconds per megapixel, so use a thread.

        Args:
            pixels: The decoded picture.
            options: The client's wishes, clamped by the planner.

        Raises:
            InvalidRequestError: The processor cannot process this picture.
        """
        header = pixels.header
        plan = self.planner.plan(header.height, header.width, options)
        image = np.frombuffer(pixels.data, dtype=np.uint8)
        size = self.planner.processor_size(options)
        try:
            features = self._processor(
                [image.reshape(header.height, header.width, NUM_CHANNELS)],
                # Said, not guessed: a picture of three rows looks like one of three channels.
                input_data_format="channels_last",
                return_tensors="pt",
                **({} if size is None else {"size": dict(size)}),
            )
        except ValueError as error:
            raise InvalidRequestError(
                f"Failed to load image: {header.width}x{header.height} pixels cannot be processed.",
                reason="INVALID_MEDIA",
            ) from error
        tensors = {
            name: value for name, value in features.items() if isinstance(value, torch.Tensor)
        }
        return TowerInputs(tensors, plan.num_pixels, plan.layout.num_embedding_tokens)


def _plain(settings: Mapping[str, object]) -> Mapping[str, object]:
    """Return ``settings`` with mappings of every kind turned into dictionaries."""
    return {
        key: dict(cast("Mapping[str, object]", value)) if isinstance(value, Mapping) else value
        for key, value in settings.items()
    }
