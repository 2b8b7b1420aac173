"""Translate ``chat.proto`` requests to domain types, checking every field on the way.

Names of fields in errors follow the JSON of the REST API, which are those of the messages without
the ``sampling`` level.
"""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING

import orjson

from chiasm.common.errors import InvalidRequestError
from chiasm.common.identity import validate_cache_salt
from chiasm.common.limits import check_size
from chiasm.common.sampling import check_wishes, wishes_from_proto
from chiasm.v1 import chat_pb2

from .chat_request import ChatMessage, ChatRequest, ChatRole, MediaItem, TextPart, Truncation
from .convert_media import MediaReader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.limits import Limits
    from chiasm.common.sampling import SamplingWishes
    from chiasm.v1 import generator_pb2

    from .media_policy import MediaPolicy

MAX_TEMPLATE_VARIABLES_BYTES = 16 * 1024
_MAX_TEMPERATURE = 100.0
_MAX_TEMPLATE_NUMBER = 1e6
_MAX_NAME_CHARS = 64
_TRUNCATE_TO_CONTEXT = -1
_RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
)

_ROLES = {
    chat_pb2.CHAT_ROLE_SYSTEM: ChatRole.SYSTEM,
    chat_pb2.CHAT_ROLE_USER: ChatRole.USER,
    chat_pb2.CHAT_ROLE_ASSISTANT: ChatRole.ASSISTANT,
    chat_pb2.CHAT_ROLE_TOOL: ChatRole.TOOL,
}
ROLE_TO_PROTO = {role.value: value for value, role in _ROLES.items()}


def chat_request_from_proto(
    message: chat_pb2.ChatCompletionRequest, limits: Limits, policy: MediaPolicy
) -> ChatRequest:
    """Return the checked request of a message; data URLs are decoded.

    Slow for large media: call it in a thread.

    Args:
        message: The request.
        limits: Bounds on it.
        policy: What the operator wishes for the processing of media.

    Raises:
        InvalidRequestError: A field is wrong; names it.
        TooLargeError: A media item is over its limit.
    """
    if message.cache_salt:
        validate_cache_salt(message.cache_salt)
    _check_request_id(message.request_id, limits)
    check_size(
        len(message.model), limits.max_model_name_chars, "characters of a model name", "model"
    )
    return ChatRequest(
        model=message.model,
        messages=_MessageReader(limits, policy).read(message),
        sampling=_sampling_from_proto(message.sampling, limits),
        stop=_stop_from_proto(message, limits),
        bad_words=_bad_words_from_proto(message, limits),
        cache_salt=message.cache_salt,
        request_id=message.request_id or uuid.uuid4().hex,
        priority=message.priority,
        template_variables=_template_variables(message.template_kwargs_json),
        adds_generation_prompt=(
            message.add_generation_prompt if message.HasField("add_generation_prompt") else True
        ),
        truncation=_truncation_from_proto(message),
        includes_media_usage=message.include_media_usage,
    )


class _MessageReader:
    """Reads the messages of one request, counting parts and characters as it goes."""

    def __init__(self, limits: Limits, policy: MediaPolicy) -> None:
        self._limits = limits
        self._media = MediaReader(limits, policy)
        self._num_parts = 0
        self._num_text_chars = 0

    def read(self, message: chat_pb2.ChatCompletionRequest) -> tuple[ChatMessage, ...]:
        count = len(message.messages)
        if not 1 <= count <= self._limits.max_messages:
            raise InvalidRequestError(
                f"There must be 1 to {self._limits.max_messages} messages, got {count}.",
                param="messages",
            )
        return tuple(
            self._message(chat_message, f"messages[{index}]")
            for index, chat_message in enumerate(message.messages)
        )

    def _message(self, message: chat_pb2.ChatMessage, param: str) -> ChatMessage:
        if message.role not in _ROLES:
            raise InvalidRequestError("The role of a message is not set.", param=f"{param}.role")
        count = len(message.content)
        if not 1 <= count <= self._limits.max_content_parts:
            raise InvalidRequestError(
                f"A message must have 1 to {self._limits.max_content_parts} content parts,"
                f" got {count}.",
                param=f"{param}.content",
            )
        self._num_parts += count
        check_size(
            self._num_parts, self._limits.max_request_parts, "content parts", f"{param}.content"
        )
        if len(message.name) > _MAX_NAME_CHARS:
            raise InvalidRequestError(
                f"A name must have at most {_MAX_NAME_CHARS} characters, got {len(message.name)}.",
                param=f"{param}.name",
            )
        content = tuple(
            self._part(part, f"{param}.content[{index}]")
            for index, part in enumerate(message.content)
        )
        return ChatMessage(_ROLES[message.role], content, message.name)

    def _part(self, part: chat_pb2.ContentPart, param: str) -> TextPart | MediaItem:
        kind = part.WhichOneof("part")
        if kind == "text":
            self._num_text_chars += len(part.text)
            check_size(
                self._num_text_chars, self._limits.max_text_chars, "characters of text", param
            )
            return TextPart(part.text)
        if kind == "media":
            return self._media.read(part.media, param)
        raise InvalidRequestError("The content part is empty.", param=param)


def _sampling_from_proto(message: generator_pb2.SamplingParams, limits: Limits) -> SamplingWishes:
    wishes = wishes_from_proto(message)
    check_wishes(wishes, limits)
    return wishes


def _bad_words_from_proto(
    message: chat_pb2.ChatCompletionRequest, limits: Limits
) -> tuple[str, ...]:
    param = "bad_words"
    count = len(message.bad_words) + len(message.sampling.bad_words)
    check_size(count, limits.max_bad_words, "bad words", param)
    for word in message.bad_words:
        check_size(len(word), limits.max_stop_chars, "characters of a bad word", param)
        if not word.strip():
            raise InvalidRequestError("bad_words must hold words, got an empty one.", param=param)
    return tuple(message.bad_words)


def _stop_from_proto(message: chat_pb2.ChatCompletionRequest, limits: Limits) -> tuple[str, ...]:
    if len(message.stop) > limits.max_stop_strings:
        raise InvalidRequestError(
            f"stop must have at most {limits.max_stop_strings} strings, got {len(message.stop)}.",
            param="stop",
        )
    for stop in message.stop:
        if not 1 <= len(stop) <= limits.max_stop_chars:
            raise InvalidRequestError(
                f"A stop string must have 1 to {limits.max_stop_chars} characters,"
                f" got {len(stop)}.",
                param="stop",
            )
    return tuple(message.stop)


def _truncation_from_proto(message: chat_pb2.ChatCompletionRequest) -> Truncation | None:
    if not message.HasField("truncate_prompt_tokens"):
        return None
    most = message.truncate_prompt_tokens
    if most < 1 and most != _TRUNCATE_TO_CONTEXT:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be at least 1, or -1 for all that fits, got {most}.",
            param="truncate_prompt_tokens",
        )
    keeps_start = message.truncation_side == chat_pb2.TRUNCATION_SIDE_RIGHT
    return Truncation(None if most == _TRUNCATE_TO_CONTEXT else most, keeps_start)


def _template_variables(data: bytes) -> Mapping[str, bool | int | float | str]:
    if not data:
        return {}
    param = "chat_template_kwargs"
    check_size(len(data), MAX_TEMPLATE_VARIABLES_BYTES, f"bytes of {param}", param)
    try:
        variables = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"{param} is not valid JSON.", param=param) from error
    if not isinstance(variables, dict):
        raise InvalidRequestError(f"{param} must be an object.", param=param)
    for name, value in variables.items():
        if not name.isidentifier() or name in _RESERVED_VARIABLES:
            raise InvalidRequestError(
                f"{param} must not set '{name[:_MAX_NAME_CHARS]}'.", param=param
            )
        if value is not None and not _is_bounded_scalar(value):
            raise InvalidRequestError(
                f"{param} must hold booleans, strings and numbers within"
                f" ±{_MAX_TEMPLATE_NUMBER:.0f}.",
                param=f"{param}.{name}",
            )
    return {name: value for name, value in variables.items() if value is not None}


def _is_bounded_scalar(value: object) -> bool:
    if isinstance(value, bool | str):
        return True
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _MAX_TEMPLATE_NUMBER
    return False


def _check_request_id(request_id: str, limits: Limits) -> None:
    if request_id and not is_request_id(request_id, limits):
        raise InvalidRequestError(
            f"request_id must have 1 to {limits.max_request_id_chars} characters of"
            " A-Z a-z 0-9 . _ : -.",
            param="request_id",
        )


def is_request_id(text: str, limits: Limits) -> bool:
    """Return whether ``text`` may be the id of a request."""
    return (
        1 <= len(text) <= limits.max_request_id_chars
        and text.isascii()
        and all(char.isalnum() or char in "._:-" for char in text)
    )
