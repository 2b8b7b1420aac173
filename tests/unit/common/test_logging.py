"""Lines of log, in both forms."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from chiasm.common.logging import bind_request_id, configure_logging, current_request_id

if TYPE_CHECKING:
    from collections.abc import Iterator


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Return that it is."""
        return True


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("chiasm")
    handlers, level, own_level = root.handlers[:], root.level, own.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    own.setLevel(own_level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


Capture = pytest.CaptureFixture[str]


def lines_of(capsys: Capture) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_line_is_json_with_time_level_service_and_event_first(capsys: Capture) -> None:
    configure_logging("encoder")

    structlog.get_logger("chiasm.x").info("item_encoded", num_tokens=3)

    (line,) = lines_of(capsys)
    assert list(line)[:4] == ["time", "level", "service", "event"]
    assert line["time"].endswith("Z")
    assert (line["level"], line["service"], line["event"]) == ("info", "encoder", "item_encoded")
    assert line["num_tokens"] == 3


async def test_request_id_is_on_every_line_of_its_task_and_on_no_other(
    capsys: Capture,
) -> None:
    configure_logging("encoder")
    log = structlog.get_logger("chiasm.x")

    async def work(request_id: str) -> None:
        bind_request_id(request_id)
        await asyncio.sleep(0)
        log.info("done", expected=current_request_id())

    await asyncio.gather(work("a"), work("b"))
    log.info("outside")

    done = [(line.get("request_id"), line.get("expected")) for line in lines_of(capsys)]
    assert done == [("a", "a"), ("b", "b"), (None, None)]
    assert current_request_id() is None


def test_lines_below_the_level_are_left_out(capsys: Capture) -> None:
    configure_logging("encoder", "warning")
    log = structlog.get_logger("chiasm.x")

    log.info("quiet")
    log.warning("loud")

    assert [line["event"] for line in lines_of(capsys)] == ["loud"]


def test_libraries_are_shown_from_warning_on_in_the_same_form(capsys: Capture) -> None:
    configure_logging("encoder", "debug")

    logging.getLogger("uvicorn").info("quiet")
    logging.getLogger("uvicorn").warning("port %d is odd", 7)

    (line,) = lines_of(capsys)
    assert (line["event"], line["service"], line["level"]) == (
        "port 7 is odd",
        "encoder",
        "warning",
    )


def test_traceback_stands_in_one_field(capsys: Capture) -> None:
    configure_logging("encoder")

    try:
        raise RuntimeError("boom")
    except RuntimeError:
        structlog.get_logger("chiasm.x").exception("failed")

    (line,) = lines_of(capsys)
    assert "RuntimeError: boom" in line["exception"]


def test_value_that_is_not_json_is_written_as_text(capsys: Capture) -> None:
    configure_logging("encoder")

    structlog.get_logger("chiasm.x").info("odd", value={1})

    assert lines_of(capsys)[0]["value"] == "{1}"


def test_terminal_gets_a_line_for_people(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging("encoder")

    structlog.get_logger("chiasm.x").info("item_encoded", num_tokens=3)

    assert "item_encoded" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")
    assert capsys.readouterr().err == ""


def test_unknown_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="debug, info, warning, error"):
        configure_logging("encoder", "loud")
