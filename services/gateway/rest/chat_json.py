"""Translate the JSON of ``POST /v1/chat/completions`` to ``chat.proto``, and check it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import orjson

from chiasm.common.errors import InvalidRequestError
from chiasm.common.identity import validate_cache_salt
from chiasm.v1 import chat_pb2

from ..convert import ROLE_TO_PROTO, chat_request_from_proto
from ..guide_param import naming_guide
from ..prompt_checks import check_stream
from .content_json import ContentReader
from .fields import Fields, type_name
from .guide_json import take_guide
from .ignored_fields import list_ignored
from .options_json import RequestOptions
from .sampling_json import take_sampling

if TYPE_CHECKING:
    from chiasm.common.limits import Limits

    from ..chat_request import ChatRequest
    from ..media_policy import MediaPolicy
    from .multipart import ChatBody

_INT32 = 1 << 31
_TRUNCATION_SIDES = {
    "left": chat_pb2.TRUNCATION_SIDE_LEFT,
    "right": chat_pb2.TRUNCATION_SIDE_RIGHT,
}
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "continue_final_message": (False,),
    "echo": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "documents": ([],),
}


@dataclass(frozen=True, slots=True)
class ParsedChat:
    """A chat request with what only its transport needs.

    Attributes:
        request: The request.
        is_stream: Answer as a stream of events.
        includes_usage: End the stream with the usage.
        has_continuous_usage: Put the usage so far into every chunk.
        ignored: Paths of fields that had no effect, as a header lists them.
    """

    request: ChatRequest
    is_stream: bool
    includes_usage: bool
    has_continuous_usage: bool
    ignored: tuple[str, ...]


def parse_chat(body: ChatBody, request_id: str, limits: Limits, policy: MediaPolicy) -> ParsedChat:
    """Return the checked request of a body; slow for large bodies: call it in a thread.

    Args:
        body: JSON of the request, and the files that came with it.
        request_id: Id of the call, unless the body has one.
        limits: Bounds on the request.
        policy: What the operator wishes for the processing of media.

    Raises:
        InvalidRequestError: The JSON is malformed or a field is wrong; names it.
        TooLargeError: A media item is over its limit.
    """
    try:
        document = orjson.loads(body.document)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InvalidRequestError(f"The body must be an object, got {type_name(document)}.")
    fields = Fields(document)
    message = chat_pb2.ChatCompletionRequest(request_id=request_id)
    is_stream = fields.take_bool("stream") or False
    stream_options = _take_stream_options(fields, is_stream=is_stream)
    _refuse_unsupported(fields)
    _take_identity(fields, message)
    take_sampling(fields, message)
    guide_param = take_guide(fields, message.sampling)
    _take_template(fields, message)
    _take_truncation(fields, message)
    options = RequestOptions(
        fields.take_object("mm_processor_kwargs"), fields.take_object("media_io_kwargs")
    )
    _take_messages(fields, message, ContentReader(body.files, options, limits))
    message.include_media_usage = fields.take_bool("include_media_usage") or False
    has_usage = stream_options.take_bool("include_usage") or False
    continuous = stream_options.take_bool("continuous_usage_stats") or False
    with naming_guide(guide_param):
        request = chat_request_from_proto(message, limits, policy)
    if is_stream:
        check_stream(request.sampling)
    return ParsedChat(
        request=replace(request, guide_param=guide_param),
        is_stream=is_stream,
        includes_usage=has_usage or message.include_media_usage,
        has_continuous_usage=has_usage and continuous,
        ignored=list_ignored(chain(fields.untaken_paths(), options.ignored)),
    )


def _take_stream_options(fields: Fields, *, is_stream: bool) -> Fields:
    options = fields.take_fields("stream_options") or Fields({})
    if options.untaken() and not is_stream:
        raise fields.error(
            "stream_options", "Stream options can only be defined when `stream=True`."
        )
    return options


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse what would change the answer if it were ignored."""
    if fields.take("chat_template") is not None:
        raise fields.error(
            "chat_template",
            "Chat template is passed with request, but --trust-request-chat-template is not set."
            " Refused request with untrusted chat template.",
        )
    if fields.take("tool_choice") == "none":
        fields.take("tools")
    for name, neutral in _NEUTRAL_VALUES.items():
        if name in fields.untaken():
            value = fields.take(name)
            if not any(type(value) is type(other) and value == other for other in neutral):
                raise fields.error(name, f"`{name}` is not supported yet.")


def _take_identity(fields: Fields, message: chat_pb2.ChatCompletionRequest) -> None:
    message.model = fields.take_str("model") or ""
    message.request_id = fields.take_str("request_id") or message.request_id
    message.priority = fields.take_int_within("priority", -_INT32, _INT32 - 1) or 0
    cache_salt = fields.take_str("cache_salt")
    if cache_salt is not None:
        validate_cache_salt(cache_salt)
        message.cache_salt = cache_salt


def _take_template(fields: Fields, message: chat_pb2.ChatCompletionRequest) -> None:
    variables = fields.take_object("chat_template_kwargs")
    if variables:
        try:
            message.template_kwargs_json = orjson.dumps(variables)
        except orjson.JSONEncodeError:  # it writes fewer levels than it reads
            name = "chat_template_kwargs"
            raise fields.error(name, f"{name} is nested too deeply.") from None
    adds_prompt = fields.take_bool("add_generation_prompt")
    if adds_prompt is not None:
        message.add_generation_prompt = adds_prompt


def _take_truncation(fields: Fields, message: chat_pb2.ChatCompletionRequest) -> None:
    most = fields.take_int_within("truncate_prompt_tokens", -_INT32, _INT32 - 1)
    if most is not None:
        message.truncate_prompt_tokens = most
    side = fields.take_str("truncation_side")
    if side is not None:
        if side not in _TRUNCATION_SIDES:
            raise fields.error("truncation_side", "truncation_side must be 'left' or 'right'.")
        message.truncation_side = _TRUNCATION_SIDES[side]


def _take_messages(
    fields: Fields, message: chat_pb2.ChatCompletionRequest, contents: ContentReader
) -> None:
    messages = fields.take_list("messages")
    if messages is None:
        raise fields.wrong_type("messages", "an array")
    for index, value in enumerate(messages):
        path = f"messages[{index}]"
        if not isinstance(value, dict):
            raise InvalidRequestError(
                f"{path} must be an object, got {type_name(value)}.", param=path
            )
        _take_message(fields.nested(value, path), message.messages.add(), contents)


def _take_message(fields: Fields, message: chat_pb2.ChatMessage, contents: ContentReader) -> None:
    role = fields.take_str("role") or ""
    if role == "developer":
        role = "system"
    if role not in ROLE_TO_PROTO:
        known = ", ".join(ROLE_TO_PROTO)
        raise fields.error("role", f"The role of a message must be one of {known}.")
    message.role = ROLE_TO_PROTO[role]
    message.name = fields.take_str("name") or ""
    content = fields.take("content")
    if content is None and role == "assistant":
        content = ""
    message.content.extend(contents.read(content, fields, has_inline_images=role == "user"))
