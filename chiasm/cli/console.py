"""Show the state of a stack: one clear line per change, and the services' logs from a level on."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_HEAD_FIELDS = ("time", "level", "service", "event", "exception")
_PROGRESS_EVENT = "load_progress"
# What transformers writes while it reads a checkpoint.
_PROGRESS_BAR = re.compile(r"Loading [a-z ]+: +(?P<percent>\d{1,3})%")


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that a service wrote, understood if it is one of our JSON lines.

    Attributes:
        text: The line, without its end.
        fields: Its fields; empty if the line is not JSON.
    """

    text: str
    fields: Mapping[str, object]

    @classmethod
    def parse(cls, text: str) -> LogLine:
        """Return ``text`` with the fields it holds."""
        if text.startswith("{"):
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError):
                return cls(text, {})
            if isinstance(fields, dict):
                return cls(text, fields)
        return cls(text, {})

    @property
    def severity(self) -> int:
        """Number of the level; a line that is not ours counts as info."""
        return _LEVELS.get(str(self.fields.get("level")), _LEVELS["info"])

    @property
    def progress_percent(self) -> int | None:
        """Percent of the loading that is done, if the line reports it."""
        if match := _PROGRESS_BAR.match(self.text):
            return int(match["percent"])
        percent = self.fields.get("percent")
        if self.fields.get("event") != _PROGRESS_EVENT or not isinstance(percent, int | float):
            return None
        return int(percent)

    def pretty(self) -> str:
        """Return the line for people."""
        if "event" not in self.fields:
            return self.text
        time = str(self.fields.get("time", "")).partition("T")[2][:8]
        rest = [f"{key}={value}" for key, value in self.fields.items() if key not in _HEAD_FIELDS]
        head = f"{time} {self.fields.get('level', '')} {self.fields['event']}"
        exception = self.fields.get("exception")
        return " ".join([head, *rest]) + (f"\n{exception}" if exception else "")


class Console:
    """Writes states to one stream and logs to another.

    What a stream does not take, such as a terminal that was closed, is lost without an error.
    """

    def __init__(self, states: TextIO, logs: TextIO, log_level: str, width: int = 12) -> None:
        """Build the console.

        Args:
            states: Stream of the lines about services.
            logs: Stream of the services' own lines.
            log_level: Least severe level of a service's line that is shown.
            width: Columns of the service names.
        """
        self._states = states
        self._logs = logs
        self._severity = _LEVELS[log_level]
        self._width = width

    def line(self, text: str = "") -> None:
        """Show a line as it is."""
        _write(self._states, f"{text}\n")

    def state(self, name: str, address: str, state: str, seconds: float | None = None) -> None:
        """Show that service ``name`` reached ``state``, after ``seconds`` if given."""
        duration = "" if seconds is None else f"  {seconds:.1f} s"
        self.line(f"{name:<{self._width}} {address:<28} {state}{duration}")

    def log(self, name: str, line: LogLine) -> bool:
        """Show a line of a service, marked with its name, if it is severe enough.

        Returns:
            Whether it was shown.
        """
        if line.severity < self._severity:
            return False
        self.show_log(name, line)
        return True

    def show_log(self, name: str, line: LogLine) -> None:
        """Show a line of a service, marked with its name."""
        parts = line.pretty().splitlines()
        _write(self._logs, "".join(f"{name:<{self._width}} | {part}\n" for part in parts))


def _write(stream: TextIO, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.write(text)
        stream.flush()
