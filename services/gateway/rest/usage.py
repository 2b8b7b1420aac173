"""Tell the usage in the form of the OpenAI API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .media_json import receipt_to_json

if TYPE_CHECKING:
    from ..chat_events import Usage


def usage_to_json(usage: Usage, *, tells_media: bool = False) -> dict[str, object]:
    """Return the ``usage`` object; it may tell of each media item."""
    document: dict[str, object] = {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "multimodal_tokens": usage.num_media_tokens,
        },
    }
    if tells_media:
        document["media"] = [receipt_to_json(receipt) for receipt in usage.media]
    return document
