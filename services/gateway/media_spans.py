"""Splice the expansions of media items into a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.media import MediaLayout

    from .prompt_builder import Prompt


@dataclass(frozen=True, slots=True)
class ExpandedPrompt:
    """A prompt with all placeholders expanded.

    Attributes:
        token_ids: Tokens of the prompt.
        offsets: Position of the first token of each item's expansion, in the order of the items.
        num_media_tokens: Tokens that belong to expansions.
    """

    token_ids: list[int]
    offsets: tuple[int, ...]
    num_media_tokens: int


def expand(prompt: Prompt, layouts: Sequence[MediaLayout]) -> ExpandedPrompt:
    """Replace the placeholder of each item by its layout's expansion.

    Args:
        prompt: Prompt with one placeholder per item.
        layouts: Layout of each item, in the order of the items.

    Returns:
        The expanded prompt. Offsets follow the items, which a template may have reordered.
    """
    token_ids: list[int] = []
    offsets = [0] * len(layouts)
    end = 0
    for index in sorted(range(len(layouts)), key=lambda item: prompt.placeholders[item]):
        placeholder = prompt.placeholders[index]
        token_ids.extend(prompt.token_ids[end:placeholder])
        offsets[index] = len(token_ids)
        token_ids.extend(layouts[index].expand())
        end = placeholder + 1
    token_ids.extend(prompt.token_ids[end:])
    num_media_tokens = sum(layout.num_tokens for layout in layouts)
    return ExpandedPrompt(token_ids, tuple(offsets), num_media_tokens)
