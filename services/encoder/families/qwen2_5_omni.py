"""Compute the rows of audio clips with the tower of Qwen2.5-Omni."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import transformers


def get_audio_features(
    model: transformers.PreTrainedModel, input_features: torch.Tensor, feature_lens: torch.Tensor
) -> list[torch.Tensor]:
    """Encode clips; transformers' own method does the same, but does not tell them apart.

    Args:
        model: The encoder half of a ``Qwen2_5OmniThinkerForConditionalGeneration``.
        input_features: Frames of the clips, one clip behind the other. [num_frames, num_mel_bins],
            floating point.
        feature_lens: Frames of each clip. [num_clips], int64.

    Returns:
        One tensor per clip: [num_tokens, hidden_size].
    """
    # Any: the attributes are those of one architecture, which the types do not know.
    base: Any = model.base_model
    rows: torch.Tensor = base.audio_tower(input_features.T, feature_lens).last_hidden_state
    _, num_tokens = base.audio_tower._get_feat_extract_output_lengths(feature_lens)
    return list(torch.split(rows, num_tokens.tolist()))
