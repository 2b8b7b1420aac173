"""The template environment, its bounds, and what is refused."""

from __future__ import annotations

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.gateway.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "é <b> 你"}]


def render(source: str, **variables: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, max_output_chars=1000)
    return template.render(MESSAGES, add_generation_prompt=True, variables=variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>é <b> 你"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é <b> 你"}'),
        ("{% if true %}\n  {% if tools %}t{% endif %}\nx{% endif %}", "x"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}a{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ wish }}", "quiet"),
        ("{{ missing }}", ""),
    ],
)
def test_templates_render_as_in_transformers(source: str, expected: str) -> None:
    assert render(source, wish="quiet") == expected


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'x' * 1001 }}", "over 1000 characters"),
        ("{% for a in range(900) %}{{ a }}{% endfor %}", "over 1000 characters"),
        ("{% for a in range(1000000) %}{% endfor %}", "OverflowError"),
    ],
)
def test_what_a_template_refuses_is_the_client_s_to_fix(source: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as caught:
        render(source)
    assert caught.value.reason == "CHAT_TEMPLATE_FAILED"
    assert caught.value.param == "messages"


def test_a_rendering_that_takes_too_long_is_refused() -> None:
    seconds = iter(range(0, 1000, 3))
    source = "{% for a in range(9) %}{{ a }}{% endfor %}"
    template = ChatTemplate(source, {}, 1000, clock=lambda: next(seconds))
    with pytest.raises(InvalidRequestError, match="takes too long"):
        template.render(MESSAGES, add_generation_prompt=False, variables={})


def test_a_client_s_variables_cannot_replace_the_messages() -> None:
    assert render("{{ messages | length }}", messages=[]) == "1"
