"""Refuse requests that the model cannot take, before anything is spent on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.sampling import check_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chiasm.common.media import Modality
    from chiasm.common.sampling import SamplingWishes

    from .chat_request import MediaItem
    from .generator_client import GeneratorInfo
    from .prompt_builder import Prompt

PROMPT_TOO_LONG = "PROMPT_TOO_LONG"


def check_media(
    items: Sequence[MediaItem],
    modalities: frozenset[Modality],
    max_items: Mapping[Modality, int],
) -> None:
    """Refuse items of a modality that the model lacks, or more than may be in one prompt.

    Args:
        items: Media items of the request.
        modalities: Modalities that the model takes.
        max_items: Most items of a modality; absent: no limit of its own.

    Raises:
        InvalidRequestError: Names the first item that is too much.
    """
    for item in items:
        limit = max_items.get(item.modality) if item.modality in modalities else 0
        if limit is None or item.index < limit:
            continue
        message = f"At most {limit} {item.modality.value}(s) may be provided in one prompt."
        if item.modality in modalities:
            message += " Set `--limit-mm-per-prompt` to increase this limit."
        raise InvalidRequestError(message, reason="TOO_MANY_MEDIA", param=item.param)


def check_sampling(sampling: SamplingWishes, generator: GeneratorInfo) -> None:
    """Refuse sampling that the generator cannot do.

    Raises:
        InvalidRequestError: A token is not in the vocabulary, or more tokens are asked for than
            the context holds.
    """
    check_vocabulary(sampling, generator.vocab_size)
    if sampling.max_tokens is not None and sampling.max_tokens > generator.max_model_len:
        raise InvalidRequestError(
            f"max_tokens={sampling.max_tokens} cannot be greater than"
            f" max_model_len={generator.max_model_len}. Please request fewer output tokens.",
            param="max_tokens",
        )


def check_stream(sampling: SamplingWishes) -> None:
    """Refuse a stream of what is told as a whole only.

    Raises:
        InvalidRequestError: Log probabilities of the prompt are asked for.
    """
    if sampling.num_prompt_logprobs is not None:
        raise InvalidRequestError(
            "`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs"
        )


def check_characters(num_chars: int, max_token_chars: int, max_model_len: int) -> None:
    """Refuse text that is too long however it is cut into tokens.

    Raises:
        InvalidRequestError: Says how many characters could fit.
    """
    max_chars = max_token_chars * max_model_len
    if num_chars > max_chars:
        raise _too_long(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt"
            f" contains {num_chars} characters (more than {max_chars} characters, which is the"
            f" upper bound for {max_model_len} input tokens). Please reduce the length of the"
            " input prompt.",
            "input_text",
        )


def check_text(prompt: Prompt, max_model_len: int) -> None:
    """Refuse a prompt that is too long before its media are expanded.

    Raises:
        InvalidRequestError: There are more tokens than the context holds.
    """
    num_tokens = prompt.num_text_tokens
    if num_tokens > max_model_len:
        raise _too_long(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt"
            f" contains {num_tokens} input tokens, which exceeds this limit even without any"
            " output tokens. Please reduce the length of the input prompt.",
            "input_tokens",
        )


def check_expanded(num_tokens: int, max_model_len: int) -> None:
    """Refuse an expanded prompt that leaves no room for one token.

    Raises:
        InvalidRequestError: Says how long prompt and context are.
    """
    advice = (
        " Make sure that `max_model_len` is no smaller than the number of text tokens plus"
        " multimodal tokens. For image inputs, the number of image tokens depends on the number of"
        " images, and possibly their aspect ratios as well."
    )
    if num_tokens > max_model_len:
        raise _too_long(
            f"The decoder prompt (length {num_tokens}) is longer than the maximum model length of"
            f" {max_model_len}.{advice}",
            "input_tokens",
        )
    if num_tokens == max_model_len:
        raise _too_long(
            f"The decoder prompt (length {num_tokens}) plus the number of requested output tokens"
            f" (at least 1) is longer than the maximum model length of {max_model_len}.{advice}",
            "input_tokens",
        )


def _too_long(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, reason=PROMPT_TOO_LONG, param=param)
