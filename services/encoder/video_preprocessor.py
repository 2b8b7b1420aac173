"""Turn videos into the tower's inputs with the checkpoint's own video processor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision
from transformers.video_utils import VideoMetadata  # noqa: E402

from chiasm.common.errors import InvalidRequestError, TooLargeError  # noqa: E402
from chiasm.common.families import SampledVideo  # noqa: E402
from chiasm.common.media import Modality, TokenRun  # noqa: E402
from chiasm.encoder.decode_pool import invalid_media  # noqa: E402
from chiasm.encoder.frame_list import pack_frames  # noqa: E402
from chiasm.encoder.image_preprocessor import ONE_PIXEL_PNG  # noqa: E402
from chiasm.encoder.preprocess import Decoding, PlannedItem, TowerInputs, plain  # noqa: E402
from chiasm.encoder.wire_image import MAX_SIDE, NUM_CHANNELS  # noqa: E402
from chiasm.encoder.wire_video import VideoHeader, VideoTask  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chiasm.common.families import Family, VideoPlanner, VisualPlan
    from chiasm.common.media import MediaLayout, ProcessingOptions
    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.memory_file import MemoryFile
    from chiasm.encoder.preprocess import MediaLimits

# Frames of a video for which neither the client nor the checkpoint says how many.
DEFAULT_NUM_FRAMES = 32
# What transformers takes a list of pictures without a clock for.
_DEFAULT_FPS = 24.0


class VideoProcessor(Protocol):
    """What is used of a transformers video processor."""

    def __call__(self, videos: list[np.ndarray], **kwargs: object) -> Mapping[str, object]:
        """Preprocess videos; keyword arguments override the processor's settings."""
        ...

    def sample_frames(self, metadata: VideoMetadata, **kwargs: object) -> Sequence[int]:
        """Return the indices of the frames to look at."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return every setting."""
        ...


class VideoPreprocessor:
    """The checkpoint's video processor and the planner that foretells its results.

    Frames are chosen by the processor itself; what is over a limit is sampled more coarsely.
    """

    def __init__(
        self,
        processor: VideoProcessor,
        planner: VideoPlanner,
        limits: MediaLimits,
        tokenizer: Tokenizer | None,
    ) -> None:
        """Take the parts; ``tokenizer`` is needed if the planner writes text between frames."""
        self._tokenizer = tokenizer
        self._processor = processor
        self._planner = planner
        self._limits = limits
        settings = processor.to_dict()
        frames_per_patch = settings.get("temporal_patch_size")
        self._frames_per_patch = frames_per_patch if isinstance(frames_per_patch, int) else 1
        self._samples_by_itself = bool(settings.get("do_sample_frames"))

    @classmethod
    def load(
        cls, model_path: Path, family: Family, config: Mapping[str, object], limits: MediaLimits
    ) -> VideoPreprocessor:
        """Load the processor of a checkpoint.

        Args:
            model_path: Directory of the checkpoint.
            family: Its family, which takes videos.
            config: Its ``config.json``.
            limits: Bounds of a video.

        Raises:
            OSError: There is no processor configuration.
            UnsupportedModelError: The family cannot plan with this processor.
        """
        processor: VideoProcessor = transformers.AutoVideoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            model_path
        )
        assert family.make_video_planner is not None, "the family takes videos"
        planner = family.make_video_planner(config, plain(processor.to_dict()))
        file = model_path / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
        return cls(processor, planner, limits, tokenizer)

    @property
    def sample(self) -> bytes:
        """A video of two frames of one pixel."""
        return bytes(pack_frames([ONE_PIXEL_PNG] * 2))

    @property
    def settings(self) -> Mapping[str, object]:
        """Every setting of the processor, in plain types, and how frames are chosen without it."""
        return {**plain(self._processor.to_dict()), "default_num_frames": DEFAULT_NUM_FRAMES}

    async def plan(
        self, decoder: DecodePool, source: MemoryFile, options: ProcessingOptions
    ) -> PlannedItem:
        """Read the container of a video and plan it; see ``Preprocessor.plan``."""
        _check_wishes(options)
        answer = await decoder.probe(Modality.VIDEO, source, self._task().pack())
        header = VideoHeader.unpack(answer)
        if not (
            0 < header.width <= MAX_SIDE
            and 0 < header.height <= MAX_SIDE
            and 0 < header.num_frames <= self._limits.max_source_frames
            and math.isfinite(header.fps)
            and (header.fps > 0 or header.is_frame_list)
        ):
            raise invalid_media(Modality.VIDEO, "the size of the video is out of range")
        return self.plan_header(source, header, options)

    def plan_header(
        self, source: MemoryFile, header: VideoHeader, options: ProcessingOptions
    ) -> PlannedItem:
        """Plan a video of a known container.

        Raises:
            InvalidRequestError: The family cannot process frames of this shape.
            TooLargeError: Not even one frame may be decoded.
        """
        if header.is_frame_list:
            # It has no clock of its own: the wish tells how fast the pictures were taken.
            header = replace(header, fps=options.fps or _DEFAULT_FPS)
            options = replace(options, fps=None)
        indices = self._sample(header, options)
        fps = len(indices) / header.num_frames * header.fps
        times = tuple(index / header.fps for index in indices)
        sampled = SampledVideo(len(indices), header.height, header.width, fps, times)
        plan = self._planner.plan(sampled, options)
        shape = (len(indices), header.height, header.width, NUM_CHANNELS)
        task = replace(
            self._task(), width=header.width, height=header.height, frame_indices=indices
        )
        return PlannedItem(
            modality=Modality.VIDEO,
            source=source,
            options=options,
            layout=self._write_texts(plan),
            num_pixels=max(math.prod(shape[:3]), plan.num_pixels),
            num_tower_pixels=plan.num_pixels,
            decoding=Decoding(task.pack(), shape),
        )

    def run(self, item: PlannedItem, media: memoryview) -> TowerInputs:
        """Preprocess the sampled frames; see ``Preprocessor.run``."""
        frames = np.frombuffer(media, dtype=np.uint8).reshape(item.decoding.shape)
        size = self._planner.processor_size(item.options)
        try:
            features = self._processor(
                [frames],
                do_sample_frames=False,
                input_data_format="channels_last",
                return_tensors="pt",
                **({} if size is None else {"size": dict(size)}),
            )
        except ValueError as error:
            _, height, width, _ = item.decoding.shape
            raise invalid_media(
                Modality.VIDEO, f"frames of {width}x{height} pixels cannot be processed."
            ) from error
        tensors = {
            name: value for name, value in features.items() if isinstance(value, torch.Tensor)
        }
        return TowerInputs(
            item.modality, tensors, item.num_tower_pixels, item.layout.num_embedding_tokens
        )

    def _write_texts(self, plan: VisualPlan) -> MediaLayout:
        """Return the layout with the texts between its runs as tokens."""
        if not plan.pieces:
            return plan.layout
        assert self._tokenizer is not None, "checked when the preprocessor was loaded"
        runs: list[TokenRun] = []
        for piece in plan.pieces:
            if isinstance(piece, TokenRun):
                runs.append(piece)
                continue
            token_ids = self._tokenizer.encode(piece, add_special_tokens=False).ids
            runs += [TokenRun(token_id, 1, is_embedding=False) for token_id in token_ids]
        return replace(plan.layout, runs=tuple(runs))

    def _task(self) -> VideoTask:
        return VideoTask(
            max_frame_pixels=self._limits.max_image_pixels,
            max_frames=self._limits.max_source_frames,
            max_duration_s=self._limits.max_video_duration_s,
        )

    def _sample(self, header: VideoHeader, options: ProcessingOptions) -> tuple[int, ...]:
        """Return the frames to decode: as wished, as the checkpoint does, or 32; within limits."""
        frame_pixels = header.width * header.height
        most = min(self._limits.max_video_frames, self._limits.max_video_pixels // frame_pixels)
        if not most:
            raise TooLargeError(
                f"Video frames of {header.width}x{header.height} pixels exceed the maximum of"
                f" {self._limits.max_video_pixels} pixels."
            )
        wishes: dict[str, object] = {}
        if options.num_frames is not None:
            wishes = self._wish_for(min(options.num_frames, most), header)
        elif options.fps is not None:
            wishes = {"fps": min(options.fps, header.fps), "num_frames": None}
        elif not self._samples_by_itself or header.is_frame_list:
            if header.num_frames <= min(most, _all_frames(header)):
                return tuple(range(header.num_frames))
            wishes = self._wish_for(min(most, _all_frames(header)), header)
        indices = self._choose(header, wishes)
        if len(indices) > most:
            indices = self._choose(header, self._wish_for(most, header))
        return indices[:most]

    def _wish_for(self, num_frames: int, header: VideoHeader) -> dict[str, object]:
        """Return the arguments for ``num_frames``, which processors round to whole patches."""
        size = self._frames_per_patch
        if round(num_frames / size) * size > header.num_frames:
            num_frames = header.num_frames // size * size
        return {"num_frames": max(num_frames, size), "fps": None}

    def _choose(self, header: VideoHeader, wishes: Mapping[str, object]) -> tuple[int, ...]:
        if header.num_frames <= self._frames_per_patch:
            # Too short to sample; the last frame is repeated to fill a patch.
            last = header.num_frames - 1
            return tuple(min(index, last) for index in range(self._frames_per_patch))
        metadata = VideoMetadata(
            total_num_frames=header.num_frames,
            fps=header.fps,
            width=header.width,
            height=header.height,
            duration=header.duration_s,
        )
        try:
            indices = self._processor.sample_frames(metadata, **wishes)
        except (ValueError, ZeroDivisionError) as error:
            raise invalid_media(
                Modality.VIDEO, f"{header.num_frames} frames cannot be sampled like this."
            ) from error
        # By rounding, some processors name one frame behind the last.
        return tuple(int(index) for index in indices if index < header.num_frames)


def _all_frames(header: VideoHeader) -> int:
    """Return how many frames are taken without any wish."""
    return header.num_frames if header.is_frame_list else DEFAULT_NUM_FRAMES


def _check_wishes(options: ProcessingOptions) -> None:
    if options.fps is not None and not (math.isfinite(options.fps) and options.fps > 0):
        raise InvalidRequestError("fps must be a positive number.", param="options.fps")
    if options.num_frames is not None and options.num_frames < 1:
        raise InvalidRequestError("num_frames must be at least 1.", param="options.num_frames")
    if options.fps is not None and options.num_frames is not None:
        raise InvalidRequestError(
            "fps and num_frames cannot be used together; set one.", param="options.num_frames"
        )
