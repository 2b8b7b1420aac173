"""Templates tell by their loops what they take as content."""

from __future__ import annotations

import pytest

from chiasm.gateway.content_format import (
    ContentFormat,
    detect_content_format,
    takes_plain_strings,
)
from tests.fakes.tokenizers import TEMPLATE

OPENAI = [
    TEMPLATE,
    "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "<image>{% endfor %}{% endfor %}",
    "{% macro show(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}",
    "{% for m in messages %}{% set parts = m.content %}"
    "{% for c in parts %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% generation %}{% for c in m.content %}{% endfor %}{% endgeneration %}"
    "{% endfor %}",
]
STRING = [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{% for w in m.content.split(' ') %}{{ w }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", OPENAI)
def test_a_loop_over_content_means_parts(source: str) -> None:
    assert detect_content_format(source) is ContentFormat.OPENAI


@pytest.mark.parametrize("source", STRING)
def test_no_loop_over_content_means_a_string(source: str) -> None:
    assert detect_content_format(source) is ContentFormat.STRING


def test_a_template_that_asks_takes_strings_too() -> None:
    assert takes_plain_strings(TEMPLATE)
    assert not takes_plain_strings(OPENAI[1])
