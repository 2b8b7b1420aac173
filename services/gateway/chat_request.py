"""A chat request as the pipeline sees it: checked, free of JSON and protobuf."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chiasm.common.sampling import GUIDE_PARAM, SamplingWishes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chiasm.common.media import Modality, ProcessingOptions

    from .media_sources import MediaSource


class ChatRole(enum.Enum):
    """Author of a message; the value is the word that templates know."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A media item to be read from an http, https or file URL."""

    url: str


class BytesSource:
    """The bytes of a media item; ``release`` gives the memory back while the request goes on."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data

    @property
    def data(self) -> bytes | None:
        """The bytes, or ``None`` once released."""
        return self._data

    def release(self) -> None:
        """Forget the bytes; doing so again is harmless."""
        self._data = None


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text that the client wrote."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A media item of a message.

    Attributes:
        modality: Kind of the item.
        index: Position among the request's items of this modality.
        param: Path of the part in the request, such as ``"messages[1].content[0]"``.
        uuid: Client's own name for the item; empty: none.
        options: Wishes for preprocessing, of the client and of the operator.
        source: Where the item is; ``None``: known under ``uuid``.
        is_plain: Whether the client has no wishes; an item without a source is then meant as it
            was named.
    """

    modality: Modality
    index: int
    param: str
    uuid: str
    options: ProcessingOptions
    source: MediaSource | None
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: ChatRole
    content: tuple[TextPart | MediaItem, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt that is too long is cut.

    Attributes:
        max_tokens: Most tokens kept, at least 1; ``None`` for what context and output leave.
        keeps_start: Whether the end is cut away, not the beginning.
    """

    max_tokens: int | None
    keeps_start: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and how many seconds it waits for the answer."""

    tenant: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to answer; see ``ChatCompletionRequest`` in ``chat.proto``.

    Attributes:
        guide_param: Field that the guide of ``sampling`` came from, for errors.
    """

    request_id: str
    model: str
    messages: tuple[ChatMessage, ...]
    sampling: SamplingWishes = field(default_factory=SamplingWishes)
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    template_variables: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    adds_generation_prompt: bool = True
    truncation: Truncation | None = None
    includes_media_usage: bool = False
    guide_param: str = GUIDE_PARAM

    @property
    def media_items(self) -> tuple[MediaItem, ...]:
        """The media items, in the order in which they stand in the conversation."""
        return tuple(part for part in self._parts() if not isinstance(part, TextPart))

    @property
    def num_text_chars(self) -> int:
        """Characters of all texts together."""
        return sum(len(part.text) for part in self._parts() if isinstance(part, TextPart))

    @property
    def num_parts(self) -> int:
        """Content parts of all messages together."""
        return sum(len(message.content) for message in self.messages)

    def _parts(self) -> Iterator[TextPart | MediaItem]:
        for message in self.messages:
            yield from message.content
