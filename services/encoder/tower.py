"""Run the towers and projectors of a checkpoint; the language model is never loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from blake3 import blake3

from chiasm.common.compute_threads import call_before_layers
from chiasm.common.families import family_of
from chiasm.common.half_load import load_half
from chiasm.common.loading_memory import give_back_loading_memory
from chiasm.common.media import DataType, Modality
from chiasm.encoder.families import pixtral, qwen2_5_omni, qwen2_audio
from chiasm.encoder.fused.fuse_tower import (
    DEFAULT_REQUEST,
    FUSED_TOWERS,
    count_packed_bytes,
    fuse_tower,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import transformers

    from chiasm.encoder.fused.fuse_tower import TowerKind, TowerRequest
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
# By the names of families.
_OWN_FEATURES_CALLS: Mapping[tuple[str, Modality], Callable[..., list[torch.Tensor]]] = {
    ("pixtral", Modality.IMAGE): pixtral.get_image_features,
    ("qwen2_audio", Modality.AUDIO): qwen2_audio.get_audio_features,
    ("qwen2_5_omni", Modality.AUDIO): qwen2_5_omni.get_audio_features,
}


class RowCountError(Exception):
    """The tower gave another number of rows than the plan promised."""


class Tower:
    """The encoder half of a checkpoint on one device. Use it from one thread."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        device: torch.device,
        request: TowerRequest,
    ) -> None:
        self._weights_digest = _digest_weights(model)
        # The wrapper around this method loses its types.
        self._model = model.to(device)  # type: ignore[arg-type]
        self._dtype = self._model.dtype
        self._kind = fuse_tower(request, self._model)
        self._device = device
        config = self._model.config.to_dict()
        family = family_of(config)
        self._family_name = family.name
        self._num_deepstack_levels = family.count_deepstack_levels(config)
        self._row_width = self.hidden_size * (1 + self._num_deepstack_levels)

    @classmethod
    def load(
        cls,
        model_path: Path,
        dtype: torch.dtype | None,
        device: torch.device,
        request: TowerRequest = DEFAULT_REQUEST,
    ) -> Tower:
        """Load the tower and projector of the checkpoint at ``model_path``.

        Args:
            model_path: Directory of the checkpoint.
            dtype: Element type of weights and embeddings; ``None`` takes the checkpoint's own.
            device: Where to run.
            request: Who shall compute it.

        Raises:
            CheckpointError: The checkpoint is incomplete or of an unknown architecture.
            UnsupportedTowerError: ``request`` needs the fused tower, which does not compute this
                checkpoint.
            KernelsUnavailableError: The kernels that ``request`` names cannot be had.
        """
        tower = cls(load_half(model_path, "encoder", dtype), device, request)
        give_back_loading_memory(model_path)
        return tower

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        return self._device

    @property
    def data_type(self) -> DataType:
        """Element type of the embeddings."""
        return _DATA_TYPES[self._dtype]

    @property
    def kind(self) -> TowerKind:
        """Who computes it."""
        return self._kind

    @property
    def weights_digest(self) -> bytes:
        """Digest of all weights as the checkpoint has them, with names and shapes; 32 bytes."""
        return self._weights_digest

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
        """Bytes of all parameters that this process holds, packed ones included."""
        num_bytes: int = sum(p.numel() * p.element_size() for p in self._model.parameters())
        return num_bytes + count_packed_bytes(self._model)

    @property
    def config(self) -> Mapping[str, object]:
        """The checkpoint's configuration, in the form that transformers normalises it to."""
        return dict(self._model.config.to_dict())

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called in a forward before each layer."""
        call_before_layers(self._model, callback)
        for module in self._model.modules():
            if isinstance(module, FUSED_TOWERS):
                module.before_block = callback

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
                arguments[name] = value.to(self._dtype)
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
        own_call = _OWN_FEATURES_CALLS.get((self._family_name, modality))
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


def _digest_weights(model: transformers.PreTrainedModel) -> bytes:
    hasher = blake3(derive_key_context="chiasm encoder weights")
    for name, weight in sorted(model.named_parameters()):
        header = json.dumps([name, str(weight.dtype), list(weight.shape)]).encode()
        hasher.update(len(header).to_bytes(8, "little") + header)
        hasher.update(bytes_of(weight.detach().to("cpu", memory_format=torch.contiguous_format)))
    return hasher.digest()
