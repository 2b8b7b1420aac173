"""Bounds on everything that comes from outside.

One frozen object is used by every entry point. A client's value may lower a limit, never raise it:
``clamp`` is the only way the two meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from chiasm.common.errors import InvalidRequestError, TooLargeError

MAX_MEDIA_TTL_S = 366 * 24 * 3600
"""Most seconds that a server may let clients keep a media item after each use."""

_MIB = 1 << 20

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds checked before anything is allocated.

    Attributes:
        max_body_bytes: Bytes of one REST body or one gRPC chat request.
        max_source_bytes: Bytes of one media item, decoded from base64 or fetched.
        max_pixels: Pixels of one picture, read from its header.
        max_side: Pixels along either side of a picture.
        min_side: Fewest pixels along either side of a picture.
        max_audio_duration_s: Seconds of one audio clip.
        max_audio_samples: Samples of all channels of one audio clip, as its file stores them.
        max_audio_channels: Channels of one audio clip.
        min_audio_rate: Fewest samples of a channel a second, in hertz.
        max_audio_rate: Most samples of a channel a second, in hertz.
        max_media_items: Media items of one request.
        max_messages: Messages of one chat.
        max_content_parts: Content parts of one message.
        max_request_parts: Content parts of all messages of one request.
        max_text_chars: Characters of all texts of one request.
        max_template_output_chars: Characters of a rendered chat template.
        max_model_name_chars: Characters of a model or adapter name.
        max_uuid_chars: Characters of a client's name for a media item.
        max_page_items: Entries of one page of a listing.
        max_cache_salt_chars: Characters of a cache salt.
        max_request_id_chars: Characters of a request id given by the client.
        max_url_chars: Characters of an http or https URL; data URLs count as sources.
        max_stop_strings: Stop strings of one request.
        max_stop_chars: Characters of one stop string.
        max_stop_token_ids: Stop token ids of one request.
        max_logit_bias: Entries of a logit bias.
        max_bad_words: Words that the output must not have.
        max_bad_word_sequences: Token sequences that spell them, up to two for a word.
        max_bad_word_tokens: Tokens of one of them.
        max_allowed_token_ids: Tokens of an explicit choice of tokens.
        max_guide_choices: Texts to choose from in structured output.
        max_logprobs: Alternatives reported per token.
        max_prompt_logprobs: Log probabilities reported of all tokens of a prompt together.
        max_choices: Answers to one request (``n``).
        max_json_bytes: Bytes of one JSON field, such as a schema or tool arguments.
        max_json_depth: Nesting of one JSON field.
        max_tensor_bytes: Bytes of one tensor sent by a client.
        max_grid_file_bytes: Bytes of a file that holds the patch grid of a tensor.
        max_listed_frames: Frames of a video that is sent as a list of pictures.
        max_fps: Frames per second that may be wished for.
        max_form_parts: Parts of one multipart/form-data body.
        max_chunk_bytes: Bytes of one chunk of a streamed source or embedding.
        max_message_bytes: Bytes of one gRPC message, on both ends.
    """

    max_body_bytes: int = 64 * _MIB
    max_source_bytes: int = 32 * _MIB
    max_pixels: int = 33_000_000
    max_side: int = 16384
    min_side: int = 1
    max_audio_duration_s: int = 600
    max_audio_samples: int = 64 * _MIB
    max_audio_channels: int = 8
    min_audio_rate: int = 1000
    max_audio_rate: int = 192_000
    max_media_items: int = 64
    max_messages: int = 4096
    max_content_parts: int = 1024
    max_request_parts: int = 16_384
    max_text_chars: int = _MIB
    max_template_output_chars: int = 4 * _MIB
    max_model_name_chars: int = 512
    max_uuid_chars: int = 512
    max_page_items: int = 100
    max_cache_salt_chars: int = 128
    max_request_id_chars: int = 128
    max_url_chars: int = 8192
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_bad_words: int = 128
    max_bad_word_sequences: int = 256
    max_bad_word_tokens: int = 64
    max_allowed_token_ids: int = 1 << 18
    max_guide_choices: int = 1024
    max_logprobs: int = 20
    max_prompt_logprobs: int = 1 << 18
    max_choices: int = 16
    max_json_bytes: int = 256 * 1024
    max_json_depth: int = 32
    max_tensor_bytes: int = 64 * _MIB
    max_grid_file_bytes: int = 64 * 1024
    max_listed_frames: int = 256
    max_fps: float = 240.0
    max_form_parts: int = 128
    max_chunk_bytes: int = _MIB
    max_message_bytes: int = 16 * _MIB


def clamp(limit: Number, requested: Number | None) -> Number:
    """Return the smaller of ``limit`` and what the client asked for; ``None`` asks for nothing."""
    return limit if requested is None else min(limit, requested)


def check_size(size: int, limit: int, what: str, param: str) -> None:
    """Refuse ``size`` if it is over ``limit``.

    Args:
        size: Announced or measured size.
        limit: Most that is accepted.
        what: What is measured and its unit, such as ``"bytes of an image"``.
        param: Path of the field at fault.

    Raises:
        InvalidRequestError: ``size`` is negative.
        TooLargeError: ``size`` is over ``limit``.
    """
    if size < 0:
        raise InvalidRequestError(f"The number of {what} must not be negative.", param=param)
    if size > limit:
        raise TooLargeError(f"{size} {what} is over the limit of {limit}.", param=param)
