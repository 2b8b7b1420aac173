"""Turn audio clips into the tower's inputs with the checkpoint's own feature extractor."""

from __future__ import annotations

import io
import wave
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

from chiasm.common.families.resampling import resampled_length  # noqa: E402
from chiasm.common.limits import Limits  # noqa: E402
from chiasm.common.media import Modality  # noqa: E402
from chiasm.encoder.decode_pool import invalid_media  # noqa: E402
from chiasm.encoder.preprocess import Decoding, PlannedItem, TowerInputs, plain  # noqa: E402
from chiasm.encoder.wire_audio import (  # noqa: E402
    RESAMPLER_QUALITY,
    SAMPLE_BYTES,
    AudioBounds,
    AudioHeader,
    AudioTask,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chiasm.common.families import AudioPlanner, Family
    from chiasm.common.media import ProcessingOptions
    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.memory_file import MemoryFile
    from chiasm.encoder.preprocess import MediaLimits

# A position of an audio tower costs what a patch of a vision tower does, of 14 x 14 pixels.
_PIXELS_PER_POSITION = 196
_BYTES_PER_PIXEL = 3
# Counted up when the same file gives other samples, which makes new names for its embeddings.
_DECODING_VERSION = 2


class FeatureExtractor(Protocol):
    """What is used of a transformers feature extractor."""

    def __call__(self, raw_speech: list[np.ndarray], **kwargs: object) -> Mapping[str, object]:
        """Compute the features of clips; keyword arguments override the extractor's settings."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return every setting."""
        ...


class AudioPreprocessor:
    """The checkpoint's feature extractor and the planner that foretells its results."""

    def __init__(
        self, extractor: FeatureExtractor, planner: AudioPlanner, bounds: AudioBounds
    ) -> None:
        self._extractor = extractor
        self._planner = planner
        self._bounds = bounds

    @classmethod
    def load(
        cls, model_path: Path, family: Family, config: Mapping[str, object], limits: MediaLimits
    ) -> AudioPreprocessor:
        """Load the feature extractor of a checkpoint.

        Args:
            model_path: Directory of the checkpoint.
            family: Its family, which hears sound.
            config: Its ``config.json``.
            limits: Bounds of a clip.

        Raises:
            OSError: There is no configuration of a feature extractor.
            UnsupportedModelError: The family cannot plan with this extractor.
        """
        extractor: FeatureExtractor = transformers.AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
            model_path
        )
        assert family.make_audio_planner is not None, "the family hears sound"
        planner = family.make_audio_planner(config, plain(extractor.to_dict()))
        general = Limits()
        bounds = AudioBounds(
            max_samples=general.max_audio_samples,
            max_duration_s=limits.max_audio_duration_s,
            max_channels=general.max_audio_channels,
            min_rate=general.min_audio_rate,
            max_rate=general.max_audio_rate,
        )
        return cls(extractor, planner, bounds)

    @property
    def sample(self) -> bytes:
        """Half a second of silence."""
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self._planner.sampling_rate)
            file.writeframes(bytes(self._planner.sampling_rate))
        return buffer.getvalue()

    @property
    def settings(self) -> Mapping[str, object]:
        """Every setting of the feature extractor, in plain types, and how clips are decoded."""
        resampling = f"mean of channels, soxr {RESAMPLER_QUALITY}"
        decoding = {"resampling": resampling, "decoding_version": _DECODING_VERSION}
        return {**plain(self._extractor.to_dict()), **decoding}

    async def plan(
        self, decoder: DecodePool, source: MemoryFile, options: ProcessingOptions
    ) -> PlannedItem:
        """Read the header of a clip and plan it; see ``Preprocessor.plan``."""
        task = AudioTask(self._bounds)
        header = AudioHeader.unpack(await decoder.probe(Modality.AUDIO, source, task.pack()))
        if not self._bounds.accepts(header):
            raise invalid_media(Modality.AUDIO, "the length of the clip is out of range")
        rate = self._planner.sampling_rate
        num_samples = resampled_length(header.num_frames, header.rate, rate)
        plan = self._planner.plan(num_samples)
        task = AudioTask(self._bounds, header, rate)
        decoding = Decoding(task.pack(), (num_samples,), SAMPLE_BYTES)
        num_tower_pixels = plan.num_positions * _PIXELS_PER_POSITION
        return PlannedItem(
            modality=Modality.AUDIO,
            source=source,
            options=options,
            layout=plan.layout,
            num_pixels=max(num_tower_pixels, decoding.num_bytes // _BYTES_PER_PIXEL),
            num_tower_pixels=num_tower_pixels,
            decoding=decoding,
        )

    def run(self, item: PlannedItem, media: memoryview) -> TowerInputs:
        """Compute the features of a decoded clip; see ``Preprocessor.run``."""
        samples = np.frombuffer(media, dtype=np.float32)
        features = self._extractor(
            [samples],
            sampling_rate=self._planner.sampling_rate,
            padding="max_length",
            max_length=self._planner.padded_length(len(samples)),
            return_attention_mask=True,
            return_tensors="pt",
        )
        values, mask = features["input_features"], features["attention_mask"]
        assert isinstance(values, torch.Tensor), "tensors were asked for"
        assert isinstance(mask, torch.Tensor), "tensors were asked for"
        tensors = {"input_features": values, "feature_attention_mask": mask}
        if self._planner.packs_frames:
            (num_frames,) = item.layout.audio_lengths
            frames = values[0, :, :num_frames].T.contiguous()
            tensors = {"input_features": frames, "feature_lens": torch.tensor([num_frames])}
        return TowerInputs(
            item.modality, tensors, item.num_tower_pixels, item.layout.num_embedding_tokens
        )
