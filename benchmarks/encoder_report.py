"""Write the figures of the encoder benchmark as Markdown."""

from __future__ import annotations

import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: What was measured.
        figure: Median with least and greatest.
        num_samples: Samples behind it.
        limit: The physical limit, or what else it must be seen beside.
        bar: What is wanted; empty: nothing.
        is_met: Whether it was reached; ``None`` without a bar.
    """

    name: str
    figure: str
    num_samples: int
    limit: str
    bar: str = ""
    is_met: bool | None = None


def head_lines() -> list[str]:
    """Return the sentence about the machine and the head of the table."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else "unknown processor"
    return [
        f"Machine: {os.cpu_count()} x {name}, torch {torch.__version__}; {load_text()} at start.",
        "",
        "| cell | median (min to max) | n | limit, or beside it | bar | met |",
        "|---|---|---|---|---|---|",
    ]


def load_text() -> str:
    """Return a phrase with the load of the machine in the last minute."""
    return f"load {os.getloadavg()[0]:.1f}"


def line(row: Row) -> str:
    """Return a line of the table."""
    met = {True: "yes", False: "**no**", None: ""}[row.is_met]
    cells = (row.name, row.figure, str(row.num_samples), row.limit, row.bar, met)
    return "| " + " | ".join(cells) + " |"


def at_most(
    name: str, values: Sequence[float], bar: float, limit: str, unit: str = "ms", digits: int = 1
) -> Row:
    """Return a row whose median must not be above ``bar``; values in ``unit``."""
    return Row(
        name,
        spread(values, unit, digits),
        len(values),
        limit,
        f"<= {bar:g} {unit}".rstrip(),
        statistics.median(values) <= bar,
    )


def at_least(name: str, values: Sequence[float], bar: float, limit: str) -> Row:
    """Return a row of ratios whose median must not be below ``bar``."""
    return Row(
        name,
        spread(values, "", 2),
        len(values),
        limit,
        f">= {bar:g}",
        statistics.median(values) >= bar,
    )


def plain(name: str, values: Sequence[float], limit: str = "", unit: str = "ms") -> Row:
    """Return a row without a bar; values in ``unit``."""
    return Row(name, spread(values, unit, 1), len(values), limit)


def spread(values: Sequence[float], unit: str, digits: int) -> str:
    """Return the median of values with their least and greatest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    text = f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return f"{text} {unit}".rstrip()


def milliseconds(seconds: Sequence[float]) -> list[float]:
    """Return durations in milliseconds."""
    return [value * 1e3 for value in seconds]
