"""The jinja environment that chat templates are written for.

It equals the one of ``transformers``: immutable sandbox, trimmed blocks, loop controls,
``raise_exception``, ``strftime_now``, a ``tojson`` that escapes nothing, and the ``generation``
tag, which renders its body.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2.parser import Parser


def template_environment() -> ImmutableSandboxedEnvironment:
    """Return a fresh environment for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``: marks an assistant's text; renders the body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares an instance attribute

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """Parse the tag into a scope that holds its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # NOTE: a call block, as in transformers: assignments in the body stay inside it.
        call = self.call_method("_render_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(time_format: str) -> str:
    return datetime.now().strftime(time_format)  # local time, as transformers
