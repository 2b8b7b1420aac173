"""Turn pictures into the tower's inputs with the checkpoint's own image processor."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from chiasm.common import torchvision_shim

_HAS_TORCHVISION = torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision
from transformers.image_utils import SizeDict  # noqa: E402

from chiasm.common.media import Modality  # noqa: E402
from chiasm.encoder.decode_pool import invalid_media  # noqa: E402
from chiasm.encoder.preprocess import Decoding, PlannedItem, TowerInputs, plain  # noqa: E402
from chiasm.encoder.wire_image import (  # noqa: E402
    NUM_CHANNELS,
    PIXEL_BYTES,
    ImageHeader,
    ImageTask,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from chiasm.common.families import Family, ImagePlanner
    from chiasm.common.media import ProcessingOptions
    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.memory_file import MemoryFile
    from chiasm.encoder.preprocess import MediaLimits

ONE_PIXEL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415408d763f8ffff3f0005fe02fedccc59e70000000049454e44ae426082"
)
_WHITE = 0xFFFFFF
_PIXELS = "pixel_values"


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

    The backend, ``torchvision`` or ``pil``, is one of the settings: they give different values.
    """

    def __init__(
        self,
        processor: ImageProcessor,
        planner: ImagePlanner,
        max_pixels: int,
        *,
        joins_any_size: bool = False,
    ) -> None:
        """Take the parts; ``joins_any_size``: see ``Family``."""
        self._settings = {**plain(processor.to_dict()), "backend": _backend()}
        # The step that is replaced would be one of the settings.
        _keep_pixels_together(processor)
        self._processor = processor
        self._planner = planner
        self._max_pixels = max_pixels
        self._joins_any_size = joins_any_size

    @classmethod
    def load(
        cls, model_path: Path, family: Family, config: Mapping[str, object], limits: MediaLimits
    ) -> ImagePreprocessor:
        """Load the processor of a checkpoint.

        Args:
            model_path: Directory of the checkpoint.
            family: Its family, which takes pictures.
            config: Its ``config.json``.
            limits: Bounds of a picture.

        Raises:
            OSError: There is no processor configuration.
            UnsupportedModelError: The family cannot plan with this processor.
        """
        processor: ImageProcessor = transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            model_path, backend=_backend()
        )
        assert family.make_image_planner is not None, "the family takes pictures"
        planner = family.make_image_planner(config, plain(processor.to_dict()))
        max_pixels = limits.max_image_pixels
        return cls(processor, planner, max_pixels, joins_any_size=family.joins_any_size)

    @property
    def sample(self) -> bytes:
        """A picture of one pixel."""
        return ONE_PIXEL_PNG

    @property
    def settings(self) -> Mapping[str, object]:
        """Every setting of the processor, in plain types, and its backend."""
        return self._settings

    async def plan(
        self, decoder: DecodePool, source: MemoryFile, options: ProcessingOptions
    ) -> PlannedItem:
        """Read the header of a picture and plan it; see ``Preprocessor.plan``."""
        task = ImageTask(self._max_pixels)
        answer = await decoder.probe(Modality.IMAGE, source, task.pack())
        header = ImageHeader.unpack(answer)
        if not 0 < header.num_pixels <= self._max_pixels:
            raise invalid_media(Modality.IMAGE, "the size of the picture is out of range")
        return self.plan_header(source, header, options)

    def plan_header(
        self, source: MemoryFile, header: ImageHeader, options: ProcessingOptions
    ) -> PlannedItem:
        """Plan a picture of a known size.

        Raises:
            InvalidRequestError: The family cannot process a picture of this shape.
        """
        plan = self._planner.plan(header.height, header.width, options)
        background = _WHITE if options.background_rgb is None else options.background_rgb
        task = ImageTask(self._max_pixels, header.width, header.height, background)
        return PlannedItem(
            modality=Modality.IMAGE,
            source=source,
            options=options,
            layout=plan.layout,
            num_pixels=max(header.num_pixels, plan.num_pixels),
            num_tower_pixels=plan.num_pixels,
            decoding=Decoding(task.pack(), (header.height, header.width, PIXEL_BYTES)),
        )

    def run(self, item: PlannedItem, media: memoryview) -> TowerInputs:
        """Preprocess a decoded picture; see ``Preprocessor.run``."""
        pixels = np.frombuffer(media, dtype=np.uint8).reshape(item.decoding.shape)
        height, width, _ = item.decoding.shape
        try:
            features = self._processor(
                [pixels[:, :, :NUM_CHANNELS]],
                # Said, not guessed: a picture of three rows looks like one of three channels.
                input_data_format="channels_last",
                return_tensors="pt",
                **self._planner.processor_arguments(height, width, item.options),
            )
        except ValueError as error:
            raise invalid_media(
                Modality.IMAGE, f"{width}x{height} pixels cannot be processed."
            ) from error
        tensors = {
            name: value.contiguous()
            for name, value in features.items()
            if isinstance(value, torch.Tensor)
        }
        if self._joins_any_size:
            tensors[_PIXELS] = tensors[_PIXELS].flatten()
        return TowerInputs(
            item.modality, tensors, item.num_tower_pixels, item.layout.num_embedding_tokens
        )


def _keep_pixels_together(processor: ImageProcessor) -> None:
    """Spare pictures of torchvision's processors the copy that gives each channel a plane.

    The resize gives the same values for either order in memory, and takes a fifth of the time if
    the channels of a pixel lie side by side, as they come, without a gap: it is given the fourth
    byte too, as a channel that is dropped. The steps behind it get planes, of what is left. Only
    steps of the base class, of Qwen and of Pixtral are replaced; a processor with a step of its own
    keeps it.
    """
    if not _HAS_TORCHVISION:
        return
    base = transformers.image_processing_backends.TorchvisionBackend
    qwen, pixtral = transformers.Qwen2VLImageProcessor, transformers.PixtralImageProcessor
    kind = type(processor)
    if not isinstance(processor, base) or kind.process_image is not base.process_image:
        return
    processor.process_image = _view_channels_first
    if kind.resize in (base.resize, qwen.resize):
        processor.resize = _with_whole_pixels(processor.resize)
    elif kind.resize is pixtral.resize:
        processor.resize = _to_whole_patches(_with_whole_pixels(MethodType(base.resize, processor)))


def _view_channels_first(image: np.ndarray, **_settings: object) -> torch.Tensor:
    """Return a picture of three channels of four, [height, width, 3], as [3, height, width]."""
    # Of the whole pixels: torch would end the memory behind the last blue.
    pixels = np.lib.stride_tricks.as_strided(image, (*image.shape[:2], PIXEL_BYTES))
    return torch.from_numpy(pixels).permute(2, 0, 1)[:NUM_CHANNELS]


def _with_whole_pixels(resize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a ``resize`` that reads the pixels of ``_view_channels_first`` whole, not copied."""

    def resize_pixels(*arguments: object, **settings: object) -> torch.Tensor:
        whole = [_whole_pixels(value) for value in arguments]
        named = {name: _whole_pixels(value) for name, value in settings.items()}
        return resize(*whole, **named).narrow(-3, 0, NUM_CHANNELS).contiguous()

    return resize_pixels


def _to_whole_patches(resize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return Pixtral's ``resize``, which finds the size from pictures of three channels alone."""
    find_size = transformers.models.pixtral.image_processing_pixtral.get_resize_output_image_size

    def resize_pixels(
        image: torch.Tensor, size: SizeDict, patch_size: SizeDict, **settings: object
    ) -> torch.Tensor:
        assert size.longest_edge, "the planner has read it"
        assert patch_size.height, "the planner gives it"
        height, width = find_size(image, size.longest_edge, patch_size.height)
        return resize(image, size=SizeDict(height=height, width=width), **settings)

    return resize_pixels


def _whole_pixels(value: object) -> object:
    """Return a picture, [..., 3, height, width], with the byte behind each pixel as a channel."""
    if not isinstance(value, torch.Tensor):
        return value
    *_, pixel_stride = strides = value.stride()
    if pixel_stride != PIXEL_BYTES or strides[-3] != 1:
        return value  # resized before
    *leading, _, height, width = value.shape
    return value.as_strided((*leading, PIXEL_BYTES, height, width), strides)


def _backend() -> str:
    return "torchvision" if _HAS_TORCHVISION else "pil"
