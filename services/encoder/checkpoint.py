"""Load everything the encoder needs of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chiasm.common.device import find_device
from chiasm.common.families import UnsupportedModelError, family_of, served_part
from chiasm.common.families.rows import RowPlanner
from chiasm.common.media import Modality, Placeholder
from chiasm.encoder.audio_preprocessor import AudioPreprocessor
from chiasm.encoder.commands import EncoderDescription
from chiasm.encoder.fingerprint import compute_fingerprint
from chiasm.encoder.fused.fuse_tower import DEFAULT_REQUEST
from chiasm.encoder.image_preprocessor import ImagePreprocessor
from chiasm.encoder.preprocess import MediaLimits
from chiasm.encoder.processor_tokens import find_processor_tokens
from chiasm.encoder.tower import Tower
from chiasm.encoder.video_preprocessor import VideoPreprocessor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chiasm.encoder.fused.fuse_tower import TowerRequest
    from chiasm.encoder.preprocess import Preprocessor

_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_PREPROCESSORS: Mapping[
    Modality, type[ImagePreprocessor | VideoPreprocessor | AudioPreprocessor]
] = {
    Modality.IMAGE: ImagePreprocessor,
    Modality.VIDEO: VideoPreprocessor,
    Modality.AUDIO: AudioPreprocessor,
}


@dataclass(frozen=True, slots=True)
class EncoderCheckpoint:
    """The encoder half of a checkpoint.

    Attributes:
        tower: Towers and projectors.
        preprocessors: The checkpoint's processors, by modality that can be encoded.
        fingerprint: Digest of all that makes an embedding besides source and options; 32 bytes.
        placeholders: What stands for one item in a prompt, by modality that can be encoded.
        row_planner: Lays out ready-made embeddings.
    """

    tower: Tower
    preprocessors: Mapping[Modality, Preprocessor]
    fingerprint: bytes
    placeholders: Mapping[Modality, Placeholder]
    row_planner: RowPlanner

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: str = "auto",
        device: str = "auto",
        limits: MediaLimits | None = None,
        request: TowerRequest = DEFAULT_REQUEST,
    ) -> EncoderCheckpoint:
        """Load a checkpoint from a directory in the hub layout; takes seconds.

        Args:
            path: The directory.
            dtype: Element type of weights and embeddings; ``auto`` takes the checkpoint's own.
            device: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.
            limits: Bounds of single items; ``None`` takes the defaults.
            request: Who shall compute the tower.

        Raises:
            CheckpointError: Weights are missing or the architecture is unknown.
            DeviceUnavailableError: ``device`` is ``cuda``, but there is no GPU.
            OSError: A file is missing.
            UnsupportedTowerError: ``request`` needs the fused tower, which does not compute this
                checkpoint.
            KernelsUnavailableError: The kernels that ``request`` names cannot be had.
            UnsupportedModelError: The family is not served, or a configuration is incomplete.
        """
        config = served_part(_read_config(path))
        family = family_of(config)
        token_ids = find_processor_tokens(family, path)
        config = {**config, **token_ids}
        preprocessors: dict[Modality, Preprocessor] = {
            modality: _PREPROCESSORS[modality].load(path, family, config, limits or MediaLimits())
            for modality in family.modalities
        }
        tower = Tower.load(path, _DTYPES[dtype], find_device(device), request)
        placeholders = {
            modality: family.placeholder(config, modality) for modality in family.modalities
        }
        fingerprint = compute_fingerprint(tower, preprocessors, token_ids)
        row_planner = RowPlanner.of(family, config)
        return cls(tower, preprocessors, fingerprint, placeholders, row_planner)

    def describe(self, model: str, *, max_source_bytes: int, max_pixels: int) -> EncoderDescription:
        """Return what callers are told of an encoder that serves this checkpoint as ``model``."""
        return EncoderDescription(
            model=model,
            fingerprint=self.fingerprint,
            placeholders=self.placeholders,
            hidden_size=self.tower.hidden_size,
            num_deepstack_levels=self.tower.num_deepstack_levels,
            data_type=self.tower.data_type,
            max_source_bytes=max_source_bytes,
            max_pixels=max_pixels,
        )


def _read_config(path: Path) -> Mapping[str, object]:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{path / 'config.json'} does not hold a JSON object.")
    return config
