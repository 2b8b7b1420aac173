"""Cut prompts that are longer than their clients want them to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError

from .media_spans import ExpandedPrompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.common.media import MediaLayout

    from .chat_request import ChatRequest, Truncation

_PARAM = "truncate_prompt_tokens"


def check_truncation(truncation: Truncation | None, max_model_len: int) -> None:
    """Refuse a truncation to more than the context holds.

    Raises:
        InvalidRequestError: Says what the context holds.
    """
    if truncation is not None and (truncation.max_tokens or 0) > max_model_len:
        raise InvalidRequestError(
            f"{_PARAM} value ({truncation.max_tokens}) is greater than max_model_len"
            f" ({max_model_len}). Please, select a smaller truncation size.",
            param=_PARAM,
        )


def truncate(
    prompt: ExpandedPrompt,
    layouts: Sequence[MediaLayout],
    request: ChatRequest,
    max_model_len: int,
) -> ExpandedPrompt:
    """Return the prompt, cut as the request wants it.

    Args:
        prompt: The whole prompt.
        layouts: Layout of each media item, in the order of ``prompt.offsets``.
        request: Says how.
        max_model_len: Tokens that the context holds.

    Raises:
        InvalidRequestError: A media item would be cut.
    """
    truncation = request.truncation
    if truncation is None:
        return prompt
    most = truncation.max_tokens
    if most is None:
        most = max(1, max_model_len - (request.sampling.max_tokens or 1))
    num_cut = len(prompt.token_ids) - most
    if num_cut <= 0:
        return prompt
    start = 0 if truncation.keeps_start else num_cut
    end = start + most
    for item, offset, layout in zip(request.media_items, prompt.offsets, layouts, strict=True):
        if offset < start or offset + layout.num_tokens > end:
            raise InvalidRequestError(
                f"A prompt of {len(prompt.token_ids)} tokens cut to {most} would lose part of a"
                f" media item; raise {_PARAM} or send less.",
                param=item.param,
            )
    return ExpandedPrompt(
        token_ids=prompt.token_ids[start:end],
        offsets=tuple(offset - start for offset in prompt.offsets),
        num_media_tokens=prompt.num_media_tokens,
    )
