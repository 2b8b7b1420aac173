"""Render a checkpoint's chat template, within bounds of time and size."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import jinja2

from chiasm.common.errors import InvalidRequestError

from .template_environment import template_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_RENDER_TIMEOUT_S = 5.0


class ChatTemplate:
    """A compiled chat template with the special tokens it may name."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        max_output_chars: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Compile ``source``.

        Args:
            source: Jinja source of the template.
            special_tokens: Names such as ``bos_token`` with their spellings.
            max_output_chars: Most characters that a rendering may have.
            clock: Seconds, for the bound on rendering time.

        Raises:
            jinja2.TemplateSyntaxError: The source is not a template.
        """
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._max_output_chars = max_output_chars
        self._clock = clock
        self._template = template_environment().from_string(source)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, object],
    ) -> str:
        """Render a conversation.

        Raises:
            InvalidRequestError: The template refuses the conversation, or the rendering is too
                long or takes too long.
        """
        context = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._render_bounded(context)
        except InvalidRequestError:
            raise
        except jinja2.TemplateError as error:
            raise _refused(str(error)) from error
        except Exception as error:  # a template may raise whatever its expressions raise
            raise _refused(type(error).__name__) from error

    def _render_bounded(self, context: Mapping[str, object]) -> str:
        deadline = self._clock() + _RENDER_TIMEOUT_S
        parts = []
        num_chars = 0
        for part in self._template.generate(context):
            parts.append(part)
            num_chars += len(part)
            if num_chars > self._max_output_chars:
                raise _refused(f"its output is over {self._max_output_chars} characters")
            if self._clock() > deadline:
                raise _refused("it takes too long")
        return "".join(parts)


def _refused(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The chat template cannot render these messages: {why}",
        reason="CHAT_TEMPLATE_FAILED",
        param="messages",
    )
