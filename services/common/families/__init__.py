"""Torch-free records of what differs between model families, for encoder and generator alike."""

from chiasm.common.families.family import Family, ImagePlan, ImagePlanner, PositionScheme
from chiasm.common.families.lookup import family_of
from chiasm.common.families.reading import UnsupportedModelError

__all__ = [
    "Family",
    "ImagePlan",
    "ImagePlanner",
    "PositionScheme",
    "UnsupportedModelError",
    "family_of",
]
