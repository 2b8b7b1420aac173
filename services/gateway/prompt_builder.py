"""Build the prompt of a conversation: render the template, encode it, find the placeholders."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError

from .chat_request import ChatRole, TextPart
from .content_format import ContentFormat, detect_content_format, takes_plain_strings
from .spellings import TextGuard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.media import Modality, Placeholder

    from .chat_request import ChatMessage, ChatRequest, MediaItem
    from .chat_template import ChatTemplate
    from .tokenizer import Tokenizer

_MAX_CHARS_ON_LOOP = 2048
# A part takes about as long to render as so many characters of text take to encode.
_CHARS_OF_A_PART = 32


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt whose media are still single placeholder tokens.

    Attributes:
        token_ids: Tokens of the prompt.
        placeholders: Position of each media item's placeholder, in the order of the items.
    """

    token_ids: list[int]
    placeholders: tuple[int, ...]

    @property
    def num_text_tokens(self) -> int:
        """Tokens that do not stand for media."""
        return len(self.token_ids) - len(self.placeholders)


class PromptBuilder:
    """Turns conversations into prompts with the checkpoint's template and tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        bos_token: str = "",
        content_format: ContentFormat = ContentFormat.AUTO,
        trusts_special_tokens: bool = False,
    ) -> None:
        """Take the parts.

        Args:
            tokenizer: The checkpoint's tokenizer.
            template: The checkpoint's chat template.
            bos_token: Spelling of the begin-of-sequence token; a rendering that starts with it
                gets no special tokens added. Empty: the checkpoint has none.
            content_format: What the template takes; ``AUTO`` looks at its source.
            trusts_special_tokens: Let spellings of special tokens in client text become tokens.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._bos_token = bos_token
        self._trusts_special_tokens = trusts_special_tokens
        self._content_format = (
            detect_content_format(template.source)
            if content_format is ContentFormat.AUTO
            else content_format
        )
        self._keeps_strings = takes_plain_strings(template.source)

    async def build(
        self, request: ChatRequest, placeholders: Mapping[Modality, Placeholder]
    ) -> Prompt:
        """Build the prompt of ``request``; long ones are built in a thread.

        Args:
            request: The conversation.
            placeholders: What stands for one item of each modality.

        Raises:
            InvalidRequestError: The template refuses the conversation, or does not place each
                media item exactly once.
        """
        size = request.num_text_chars + _CHARS_OF_A_PART * request.num_parts
        if size <= _MAX_CHARS_ON_LOOP:
            return self.build_now(request, placeholders)
        return await asyncio.to_thread(self.build_now, request, placeholders)

    def build_now(
        self, request: ChatRequest, placeholders: Mapping[Modality, Placeholder]
    ) -> Prompt:
        """Build the prompt of ``request`` in this thread; see ``build``."""
        guard = _Guards(self._tokenizer, is_open=self._trusts_special_tokens)
        rendered = self._template.render(
            [self._message(message, guard, placeholders) for message in request.messages],
            add_generation_prompt=request.adds_generation_prompt,
            variables={
                name: guard.protect(value) if isinstance(value, str) else value
                for name, value in request.template_variables.items()
            },
        )
        rendered = self._add_margins(rendered, placeholders)
        adds_special_tokens = not (self._bos_token and rendered.startswith(self._bos_token))
        token_ids = self._tokenizer.encode_guarded(
            rendered, guard.text_guard, add_special_tokens=adds_special_tokens
        )
        return Prompt(token_ids, _find(token_ids, request.media_items, placeholders))

    def _add_margins(self, rendered: str, placeholders: Mapping[Modality, Placeholder]) -> str:
        for placeholder in placeholders.values():
            if margin := placeholder.margin:
                spelling = self._tokenizer.spelling_of(placeholder.token_id)
                rendered = rendered.replace(spelling, f"{margin}{spelling}{margin}")
        return rendered

    def _message(
        self, message: ChatMessage, guard: _Guards, placeholders: Mapping[Modality, Placeholder]
    ) -> dict[str, object]:
        content: object
        if self._content_format is ContentFormat.STRING:
            content = self._as_string(message, guard, placeholders)
        else:
            content = self._as_parts(message, guard)
        named = {"name": guard.protect(message.name)} if message.name else {}
        return {"role": message.role.value, "content": content, **named}

    def _as_parts(self, message: ChatMessage, guard: _Guards) -> object:
        parts = message.content
        if len(parts) == 1 and isinstance(parts[0], TextPart) and self._keeps_strings:
            return guard.protect(parts[0].text, message.role)
        return [
            {"type": "text", "text": guard.protect(part.text, message.role)}
            if isinstance(part, TextPart)
            else {"type": part.modality.value}
            for part in parts
        ]

    def _as_string(
        self, message: ChatMessage, guard: _Guards, placeholders: Mapping[Modality, Placeholder]
    ) -> str:
        media = [
            self._tokenizer.spelling_of(placeholders[part.modality].token_id)
            for part in message.content
            if not isinstance(part, TextPart)
        ]
        texts = [
            guard.protect(part.text, message.role)
            for part in message.content
            if isinstance(part, TextPart)
        ]
        return "\n".join([*media, *texts])


class _Guards:
    """Protects the texts of one request, by who wrote them.

    Spellings of tokens that are added but not special, such as ``</think>``, stay live in an
    assistant's message: they are how the model wrote them, and templates look for them.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_open: bool) -> None:
        self.text_guard = TextGuard(tokenizer.spellings)
        self._special = tokenizer.special_spellings
        self._is_open = is_open

    def protect(self, text: str, role: ChatRole = ChatRole.USER) -> str:
        if self._is_open:
            return text
        if role is ChatRole.ASSISTANT:
            return self.text_guard.protect(text, self._special)
        return self.text_guard.protect(text)


def _find(
    token_ids: list[int], items: tuple[MediaItem, ...], placeholders: Mapping[Modality, Placeholder]
) -> tuple[int, ...]:
    """Return the position of each item's placeholder; raise if one is missing or left over."""
    modality_of = {one.token_id: modality for modality, one in placeholders.items()}
    positions: dict[Modality, list[int]] = {modality: [] for modality in placeholders}
    if modality_of:
        for position, token_id in enumerate(token_ids):
            if token_id in modality_of:
                positions[modality_of[token_id]].append(position)
    wanted = Counter(item.modality for item in items)
    for modality, found in positions.items():
        if len(found) > wanted[modality]:
            raise InvalidRequestError(
                f"Found more {modality.value} placeholders in the prompt ({len(found)}) than"
                f" actual multimodal data items ({wanted[modality]}).",
                param="messages",
            )
        if len(found) < wanted[modality]:
            raise InvalidRequestError(
                f"The chat template placed {len(found)} of {wanted[modality]}"
                f" {modality.value} item(s); it may not take them in this message.",
                param="messages",
            )
    return tuple(positions[item.modality][item.index] for item in items)
