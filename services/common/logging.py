"""Set up structured logs: pretty on a terminal, JSON lines elsewhere, always to stderr.

Every line has ``time``, ``level``, ``service``, ``event`` and, inside a request, ``request_id``.
Lines of libraries that use the standard library's logging come out in the same form.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, Processor, WrappedLogger

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_LIBRARY_LEVEL = logging.WARNING


def configure_logging(service: str, level: str = "info") -> None:
    """Send all logs of this process to stderr, marked with ``service``.

    Args:
        service: Name that every line carries.
        level: Least severe level that is shown: debug, info, warning or error. Libraries are shown
            from warning on, or from ``level`` if that is higher.

    Raises:
        ValueError: ``level`` is none of the four.
    """
    if level not in _LEVELS:
        raise ValueError(f"Log level {level!r} must be one of {', '.join(_LEVELS)}.")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _add_service(service),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(is_terminal=sys.stderr.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(_LIBRARY_LEVEL, _LEVELS[level]))
    logging.getLogger("chiasm").setLevel(_LEVELS[level])


def bind_request_id(request_id: str) -> None:
    """Put ``request_id`` on every line that the current task and its children log from now on."""
    structlog.contextvars.bind_contextvars(request_id=request_id)


def current_request_id() -> str | None:
    """Return the request id bound to the current task; ``None`` outside a request."""
    value = structlog.contextvars.get_contextvars().get("request_id")
    return value if isinstance(value, str) else None


def _add_service(service: str) -> Callable[[WrappedLogger, str, EventDict], EventDict]:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    return add


def _put_first(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    first = {key: event[key] for key in ("time", "level", "service", "event") if key in event}
    return {**first, **event}


def _renderers(*, is_terminal: bool) -> list[Processor]:
    if is_terminal:
        # Plain: a traceback with locals would show prompts.
        return [
            structlog.dev.ConsoleRenderer(
                timestamp_key="time", exception_formatter=structlog.dev.plain_traceback
            )
        ]
    return [
        structlog.processors.format_exc_info,
        _put_first,
        structlog.processors.JSONRenderer(default=str),
    ]
