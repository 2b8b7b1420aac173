"""Translate the JSON fields that say what an answer must look like to ``generator.proto``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from chiasm.common.sampling import GUIDE_PARAM
from chiasm.v1 import generator_pb2

from .fields import Fields

if TYPE_CHECKING:
    from collections.abc import Callable

_ANY_OBJECT = b'{"type":"object"}'


def take_guide(fields: Fields, sampling: generator_pb2.SamplingParams) -> str:
    """Take ``response_format``, ``structured_outputs`` or one of the older ``guided_*`` fields.

    Returns:
        Name of the field that the guide came from; if there is none, the usual one.

    Raises:
        InvalidRequestError: One is wrong, or there are several.
    """
    guides = [("response_format", guide) for guide in _from_response_format(fields)]
    guides += [(GUIDE_PARAM, guide) for guide in _from_structured_outputs(fields)]
    for kind, make in _MAKERS.items():
        name = f"guided_{kind}"
        guides += [(name, guide) for guide in _take(fields, name, make)]
    if len(guides) > 1:
        raise fields.error(
            GUIDE_PARAM, "You can only use one kind of constraints for structured outputs."
        )
    if not guides:
        return GUIDE_PARAM
    name, guide = guides[0]
    sampling.guide.CopyFrom(guide)
    return name


def _from_response_format(fields: Fields) -> list[generator_pb2.Guide]:
    name = "response_format"
    inner = fields.take_fields(name)
    if inner is None:
        return []
    kind = inner.take_str("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [generator_pb2.Guide(json_schema_json=_ANY_OBJECT)]
    if kind != "json_schema":
        raise inner.error("type", "response_format must be text, json_object or json_schema.")
    schema = inner.take_fields("json_schema") or Fields({}, f"{name}.json_schema")
    schema.take("name")
    schema.take("strict")  # every guide is
    guides = _take(schema, "schema", _json_guide)
    if not guides:
        raise schema.error("schema", "response_format of json_schema needs a schema.")
    return guides


def _from_structured_outputs(fields: Fields) -> list[generator_pb2.Guide]:
    inner = Fields(fields.take_object(GUIDE_PARAM) or {}, GUIDE_PARAM)
    guides = [guide for name, make in _MAKERS.items() for guide in _take(inner, name, make)]
    if inner.take_bool("json_object"):
        guides.append(generator_pb2.Guide(json_schema_json=_ANY_OBJECT))
    unknown = inner.untaken()
    if unknown:
        raise inner.error(unknown[0], f"`{unknown[0][:64]}` is not supported.")
    return guides


def _take(
    fields: Fields, name: str, make: Callable[[Fields, str], generator_pb2.Guide]
) -> list[generator_pb2.Guide]:
    return [make(fields, name)] if fields.take(name) is not None else []


def _json_guide(fields: Fields, name: str) -> generator_pb2.Guide:
    """Take a schema, as an object or as its JSON."""
    value = fields.take(name)
    if isinstance(value, str):
        return generator_pb2.Guide(json_schema_json=value.encode())
    if not isinstance(value, dict | bool):
        raise fields.wrong_type(name, "a JSON schema")
    try:
        return generator_pb2.Guide(json_schema_json=orjson.dumps(value))
    except orjson.JSONEncodeError:  # it writes fewer levels than it reads
        raise fields.error(name, f"{name} is nested too deeply.") from None


def _regex_guide(fields: Fields, name: str) -> generator_pb2.Guide:
    return generator_pb2.Guide(regex=fields.take_str(name) or "")


def _grammar_guide(fields: Fields, name: str) -> generator_pb2.Guide:
    return generator_pb2.Guide(grammar=fields.take_str(name) or "")


def _choice_guide(fields: Fields, name: str) -> generator_pb2.Guide:
    choices = fields.take_list(name) or []
    texts = [choice for choice in choices if isinstance(choice, str)]
    if len(texts) != len(choices) or not texts:
        raise fields.error(name, f"{name} must hold strings, at least one.")
    return generator_pb2.Guide(choices=generator_pb2.Choices(texts=texts))


_MAKERS = {
    "json": _json_guide,
    "regex": _regex_guide,
    "choice": _choice_guide,
    "grammar": _grammar_guide,
}
