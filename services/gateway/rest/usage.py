"""Tell the usage in the form of the OpenAI API."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..chat_events import Usage


def usage_to_json(usage: Usage) -> dict[str, object]:
    """Return the ``usage`` object."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "multimodal_tokens": usage.num_media_tokens,
        },
    }
