"""Count the samples of a clip at the rate that a model hears."""

from __future__ import annotations


def resampled_length(num_frames: int, rate: int, target_rate: int) -> int:
    """Return the samples of a channel of ``num_frames`` samples at ``target_rate`` a second.

    A part of a sample counts as one, as librosa has it.
    """
    return -(-num_frames * target_rate // rate)
