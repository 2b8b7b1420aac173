"""Say what travels on a session: commands of the caller, events of its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chiasm.common.errors import ChiasmError
    from chiasm.generator.admission import GenerationRequest
    from chiasm.generator.generation import GenerationEvent
    from chiasm.generator.span_tracker import SpanUpdate


@dataclass(frozen=True, slots=True)
class StartRequest:
    """Start a request.

    Attributes:
        key: Names the request on its session.
        request: The prompt; nothing of it is checked yet.
        deadline_s: Seconds that it may take.
        num_credit_tokens: Tokens that may be sent before more credit comes.
        is_half_closed: Whether no embedding will be reported.
    """

    key: int
    request: GenerationRequest
    deadline_s: float
    num_credit_tokens: int
    is_half_closed: bool


@dataclass(frozen=True, slots=True)
class UpdateSpan:
    """Tell a request something about an embedding."""

    key: int
    update: SpanUpdate


@dataclass(frozen=True, slots=True)
class HalfClose:
    """Tell a request that no embedding will be reported any more."""

    key: int


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """End a request; nothing more is said of it."""

    key: int


@dataclass(frozen=True, slots=True)
class StopAnswer:
    """End one answer of a request; the others go on."""

    key: int
    index: int


@dataclass(frozen=True, slots=True)
class RefuseRequest:
    """End a request by ``error``: a message of it could not be read."""

    key: int
    error: ChiasmError


@dataclass(frozen=True, slots=True)
class GrantCredit:
    """Let more tokens of some requests be sent: pairs of key and number of tokens."""

    grants: tuple[tuple[int, int], ...]


SessionCommand = (
    StartRequest | UpdateSpan | HalfClose | StopAnswer | CancelRequest | RefuseRequest | GrantCredit
)


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """What happened to the request named ``key``; an error is the last of its events."""

    key: int
    event: GenerationEvent | ChiasmError
