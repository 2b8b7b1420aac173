"""Compute the rows of audio clips with the tower of Qwen2-Audio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import create_bidirectional_mask

if TYPE_CHECKING:
    import transformers


def get_audio_features(
    model: transformers.PreTrainedModel,
    input_features: torch.Tensor,
    feature_attention_mask: torch.Tensor,
) -> list[torch.Tensor]:
    """Encode clips as the whole model does between its processor and its language model.

    Args:
        model: The encoder half of a ``Qwen2AudioForConditionalGeneration``.
        input_features: Log-mel spectrograms. [num_clips, num_mel_bins, num_frames], floating point.
        feature_attention_mask: Frames that hold sound. [num_clips, num_frames], integers.

    Returns:
        One tensor per clip: [num_tokens, hidden_size].
    """
    # Any: the attributes are those of one architecture, which the types do not know.
    base: Any = model.base_model
    tower = base.audio_tower
    lengths, num_tokens = tower._get_feat_extract_output_lengths(feature_attention_mask.sum(-1))
    num_positions = (input_features.shape[-1] - 2) // 2 + 1
    is_sound = torch.arange(num_positions, device=lengths.device) < lengths[:, None]
    mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=input_features.new_zeros(len(lengths), num_positions, 1),
        attention_mask=is_sound.long(),
    )
    hidden = tower(input_features, attention_mask=mask).last_hidden_state
    rows = base.multi_modal_projector(hidden)
    return [clip[:count] for clip, count in zip(rows, num_tokens.tolist(), strict=True)]
