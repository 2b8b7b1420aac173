"""Find the family of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from chiasm.common.families.gemma3 import GEMMA3
from chiasm.common.families.llava import LLAVA
from chiasm.common.families.llava_onevision import LLAVA_ONEVISION
from chiasm.common.families.pixtral import PIXTRAL
from chiasm.common.families.qwen2_5_omni import QWEN2_5_OMNI
from chiasm.common.families.qwen2_audio import QWEN2_AUDIO
from chiasm.common.families.qwen3_vl import QWEN3_VL
from chiasm.common.families.qwen_vl import QWEN_VL
from chiasm.common.families.reading import UnsupportedModelError

if TYPE_CHECKING:
    from chiasm.common.families.family import Family

# The first that fits is taken: those with towers of certain types stand before those of any.
FAMILIES: tuple[Family, ...] = (
    QWEN_VL,
    QWEN3_VL,
    PIXTRAL,
    LLAVA,
    LLAVA_ONEVISION,
    QWEN2_AUDIO,
    QWEN2_5_OMNI,
    GEMMA3,
)

# Checkpoints of several models, and the section of the one that is served.
_SERVED_SECTIONS = {"qwen2_5_omni": "thinker_config"}


def served_part(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the part of a ``config.json`` that describes the model that is served.

    That is all of it, but for checkpoints that hold several models.
    """
    part = config.get(_SERVED_SECTIONS.get(str(config.get("model_type")), ""))
    return cast("Mapping[str, object]", part) if isinstance(part, Mapping) else config


def family_of(config: Mapping[str, object]) -> Family:
    """Return the family of a checkpoint by the types of its model and tower in ``config.json``.

    Raises:
        UnsupportedModelError: No family has this type; the message lists those that exist.
    """
    model_type = config.get("model_type")
    vision_config = config.get("vision_config")
    tower_type = vision_config.get("model_type") if isinstance(vision_config, Mapping) else None
    for family in FAMILIES:
        is_of_tower = not family.tower_types or tower_type in family.tower_types
        if is_of_tower and model_type in family.model_types:
            return family
    is_known = any(model_type in family.model_types for family in FAMILIES)
    tower = f" with a tower of type {tower_type!r}" if is_known else ""
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedModelError(
        f"Models of type {model_type!r}{tower} are not supported; supported types: {known}."
    )
