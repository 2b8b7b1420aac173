"""Run the towers and projectors of a checkpoint; the language model is never loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.common.families import family_of
from chiasm.common.half_load import load_half
from chiasm.common.media import DataType, Modality
from chiasm.encoder.families import qwen2_5_omni, qwen2_audio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import transformers

    from chiasm.encoder.preprocess import TowerInputs

_DATA_TYPES = {
    torch.float32: DataType.FLOAT32,
    torch.float16: DataType.FLOAT16,
    torch.bfloat16: DataType.BFLOAT16,
}
_FEATURES_CALLS = {
    Modality.IMAGE: "get_image_features",
    Modality.VIDEO: "get_video_features",
    Modality.AUDIO: "get_audio_features",
}
_OWN_FEATURES_CALLS: Mapping[tuple[str, Modality], Callable[..., list[torch.Tensor]]] = {
    ("qwen2_audio", Modality.AUDIO): qwen2_audio.get_audio_features,
    ("qwen2_5_omni_thinker", Modality.AUDIO): qwen2_5_omni.get_audio_features,
}


class RowCountError(Exception):
    """The tower gave another number of rows than the plan promised."""


class Tower:
    """The encoder half of a checkpoint on one device. Use it from one thread."""

    def __init__(self, model: transformers.PreTrainedModel, device: torch.device) -> None:
        # The wrapper around this method loses its types.
        self._model = model.to(device)  # type: ignore[arg-type]
        self._device = device
        config = self._model.config.to_dict()
        self._num_deepstack_levels = family_of(config).count_deepstack_levels(config)
        self._row_width = self.hidden_size * (1 + self._num_deepstack_levels)

    @classmethod
    def load(cls, model_path: Path, dtype: torch.dtype | None, device: torch.device) -> Tower:
        """Load the tower and projector of the checkpoint at ``model_path``.

        Args:
            model_path: Directory of the checkpoint.
            dtype: Element type of weights and embeddings; ``None`` takes the checkpoint's own.
            device: Where to run.

        Raises:
            CheckpointError: The checkpoint is incomplete or of an unknown architecture.
        """
        return cls(load_half(model_path, "encoder", dtype), device)

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        return self._device

    @property
    def data_type(self) -> DataType:
        """Element type of the embeddings."""
        return _DATA_TYPES[self._model.dtype]

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings' rows: that of the language model."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def num_deepstack_levels(self) -> int:
        """Tensors of an embedding that are added behind layers of the language model."""
        return self._num_deepstack_levels

    @property
    def num_parameter_bytes(self) -> int:
        """Bytes of all parameters that this process holds."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    @property
    def config(self) -> Mapping[str, object]:
        """The checkpoint's configuration, in the form that transformers normalises it to."""
        return dict(self._model.config.to_dict())

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter with its name, in a fixed order."""
        yield from sorted(self._model.named_parameters())

    @torch.inference_mode()
    def encode(self, items: Sequence[TowerInputs]) -> list[torch.Tensor]:
        """Encode items in one forward.

        Args:
            items: Preprocessed items that join; at least one.

        Returns:
            One tensor per item. [num_rows, row_width], the tower's dtype, contiguous, on the CPU.
            ``row_width`` is the width of the language model, once for the spliced rows and once
            for every deepstack level.

        Raises:
            RowCountError: An item has another number of rows than planned.
        """
        arguments = {
            name: torch.cat([item.tensors[name] for item in items]).to(self._device)
            for name in items[0].tensors
        }
        for name, value in arguments.items():
            if value.is_floating_point():
                arguments[name] = value.to(self._model.dtype)
        features = self._compute_features(items[0].modality, arguments)
        embeddings = [rows.reshape(-1, rows.shape[-1]) for rows in features]
        for item, rows in zip(items, embeddings, strict=True):
            if rows.shape != (item.num_rows, self._row_width):
                raise RowCountError(
                    f"planned [{item.num_rows}, {self._row_width}], got {list(rows.shape)}"
                )
        return [rows.to("cpu").contiguous() for rows in embeddings]

    def _compute_features(
        self, modality: Modality, arguments: Mapping[str, torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Call the family's own function if there is one, else the method of the model."""
        own_call = _OWN_FEATURES_CALLS.get((self._model.config.model_type, modality))
        if own_call is not None:
            return own_call(self._model, **arguments)
        output = getattr(self._model, _FEATURES_CALLS[modality])(**arguments)
        features: Sequence[torch.Tensor] = output.pooler_output
        levels: Sequence[Sequence[torch.Tensor]] = getattr(output, "deepstack_features", None) or ()
        if not levels:
            return features
        return [torch.cat(parts, dim=1) for parts in zip(features, *levels, strict=True)]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the elements of a contiguous CPU tensor as bytes, without copying them."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
