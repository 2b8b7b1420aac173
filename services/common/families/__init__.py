"""Torch-free records of what differs between model families, for encoder and generator alike."""

from chiasm.common.families.family import (
    Family,
    ImagePlanner,
    PositionScheme,
    SampledVideo,
    VideoPlanner,
    VisualPlan,
)
from chiasm.common.families.lookup import family_of
from chiasm.common.families.reading import UnsupportedModelError

__all__ = [
    "Family",
    "ImagePlanner",
    "PositionScheme",
    "SampledVideo",
    "UnsupportedModelError",
    "VideoPlanner",
    "VisualPlan",
    "family_of",
]
