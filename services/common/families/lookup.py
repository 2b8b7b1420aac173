"""Find the family of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.families.llava import LLAVA
from chiasm.common.families.qwen2_5_omni import QWEN2_5_OMNI
from chiasm.common.families.qwen2_audio import QWEN2_AUDIO
from chiasm.common.families.qwen_vl import QWEN_VL
from chiasm.common.families.reading import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.families.family import Family

FAMILIES: tuple[Family, ...] = (QWEN_VL, LLAVA, QWEN2_AUDIO, QWEN2_5_OMNI)


def family_of(config: Mapping[str, object]) -> Family:
    """Return the family of a checkpoint by the ``model_type`` of its ``config.json``.

    Raises:
        UnsupportedModelError: No family has this type; the message lists those that exist.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UnsupportedModelError(
        f"Models of type {model_type!r} are not supported; supported types: {known}."
    )
