"""Torch-free records of what differs between model families, for encoder and generator alike."""

from chiasm.common.families.family import (
    AudioPlan,
    AudioPlanner,
    Family,
    ImagePlanner,
    PositionScheme,
    SampledVideo,
    VideoPlanner,
    VisualPlan,
)
from chiasm.common.families.lookup import family_of, served_part
from chiasm.common.families.reading import UnsupportedModelError

__all__ = [
    "AudioPlan",
    "AudioPlanner",
    "Family",
    "ImagePlanner",
    "PositionScheme",
    "SampledVideo",
    "UnsupportedModelError",
    "VideoPlanner",
    "VisualPlan",
    "family_of",
    "served_part",
]
