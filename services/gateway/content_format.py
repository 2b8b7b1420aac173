"""Find out how a chat template wants the content of messages.

``openai``: a list of typed parts, which the template loops over. ``string``: one string, into
which the caller has put the placeholders of the media.
"""

from __future__ import annotations

import enum

import jinja2.nodes

from .template_environment import template_environment

_CONTENT = "content"


class ContentFormat(enum.Enum):
    """What a template takes as the content of a message; the value is the flag's word."""

    AUTO = "auto"
    OPENAI = "openai"
    STRING = "string"


def detect_content_format(source: str) -> ContentFormat:
    """Return ``OPENAI`` if the template loops over the content of messages, else ``STRING``.

    Args:
        source: Jinja source; the tags of chat templates are understood.

    Source: vLLM's detection from the template's syntax tree.
    """
    tree = template_environment().parse(source)
    names = {_CONTENT}
    for assignment in tree.find_all(jinja2.nodes.Assign):
        if isinstance(assignment.target, jinja2.nodes.Name) and _names_content(
            assignment.node, names
        ):
            names.add(assignment.target.name)
    loops = tree.find_all(jinja2.nodes.For)
    is_looped = any(_names_content(loop.iter, names) for loop in loops)
    return ContentFormat.OPENAI if is_looped else ContentFormat.STRING


def takes_plain_strings(source: str) -> bool:
    """Return whether the template asks if something is a string, so that plain text may stay one.

    A template that loops over parts and never asks would loop over the characters of a string.
    """
    return any(
        test.name == "string"
        for test in template_environment().parse(source).find_all(jinja2.nodes.Test)
    )


def _names_content(node: jinja2.nodes.Node, names: set[str]) -> bool:
    """Return whether ``node`` is a message's content, maybe filtered; not a call on it."""
    if isinstance(node, jinja2.nodes.Name):
        return node.name in names
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == _CONTENT
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == _CONTENT
    if isinstance(node, jinja2.nodes.Filter) and node.node is not None:
        return _names_content(node.node, names)
    if isinstance(node, jinja2.nodes.CondExpr):
        branches = [node.expr1, *([node.expr2] if node.expr2 else [])]
        return any(_names_content(branch, names) for branch in branches)
    return False
