"""Compute the rows of pictures with the tower of Pixtral and Mistral 3."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from chiasm.encoder.fused.axial_tower import AxialTower

if TYPE_CHECKING:
    import transformers


def get_image_features(
    model: transformers.PreTrainedModel, pixel_values: torch.Tensor, image_sizes: torch.Tensor
) -> list[torch.Tensor]:
    """Encode pictures of any sizes; transformers' own method loses a picture of one token.

    Args:
        model: The encoder half of a ``LlavaForConditionalGeneration`` with Pixtral's tower, or of
            a ``Mistral3ForConditionalGeneration``.
        pixel_values: Pictures one behind the other, each [3, height, width], flattened.
            [num_values], floating point.
        image_sizes: Height and width of each, in pixels. [num_pictures, 2], int64.

    Returns:
        One tensor per picture: [num_tokens, hidden_size].
    """
    # Any: the attributes are those of two architectures, which the types do not know.
    base: Any = model.base_model
    config: Any = model.config
    sizes = [(height, width) for height, width in image_sizes.tolist()]
    values = torch.split(pixel_values, [3 * height * width for height, width in sizes])
    pictures = [one.view(3, *size) for one, size in zip(values, sizes, strict=True)]
    takes_list = isinstance(base.vision_tower, AxialTower)
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    states = base.vision_tower(
        pictures if takes_list else _pad(pictures),
        image_sizes=image_sizes,
        output_hidden_states=layers,
    ).hidden_states
    read = torch.cat([states[layer] for layer in layers], dim=-1)[0]
    merge_size = getattr(config, "spatial_merge_size", None)
    projector = base.multi_modal_projector
    rows = projector(read) if merge_size is None else projector(read, image_sizes)
    token_side = base.vision_tower.patch_size * (merge_size or 1)
    num_tokens = [math.prod(side // token_side for side in size) for size in sizes]
    return list(torch.split(rows, num_tokens))


def _pad(pictures: list[torch.Tensor]) -> torch.Tensor:
    """Return pictures as one tensor, as the family's processor pads those of one prompt."""
    height, width = (max(picture.shape[dim] for picture in pictures) for dim in (1, 2))
    return torch.stack(
        [
            pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]))
            for picture in pictures
        ]
    )
