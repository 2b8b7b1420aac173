"""Write the figures of the engine benchmark as Markdown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.line_plot import fit_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.engine_load import BatchRun
    from benchmarks.line_plot import Line

_PARTS = ("schedule_s", "build_s", "sample_s", "update_s")


@dataclass(frozen=True, slots=True)
class Limit:
    """What memory allows: every step reads all weights once.

    Attributes:
        weight_bytes: Bytes of decoder and head.
        bytes_per_s: Measured read bandwidth.
    """

    weight_bytes: int
    bytes_per_s: float

    @property
    def step_s(self) -> float:
        """Least seconds of one step, whatever its batch."""
        return self.weight_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds for the same prompts, one value per round."""

    num_tokens: int
    engine_s: list[float]
    one_by_one_s: list[float]
    padded_s: list[float]


def limit_lines(limit: Limit) -> list[str]:
    """Return the sentence about the physical limit."""
    return [
        f"Limit: {limit.weight_bytes / 1e6:,.0f} MB of weights at"
        f" {limit.bytes_per_s / 1e9:.1f} GB/s measured read bandwidth are"
        f" {limit.step_s * 1e3:.1f} ms a step.",
        "",
    ]


def overhead_lines(runs: dict[int, list[BatchRun]], limit: Limit) -> list[str]:
    """Return the table of what a decode step takes outside of the forward, by batch."""
    names = [name for name in _PARTS if any(run.part_s(name) for run in runs[min(runs)])]
    lines = [
        _row("batch", "step", "forward", *(name[:-2] for name in names), "outside", "limit"),
        _rule(5 + len(names)),
    ]
    for batch, rounds in runs.items():
        parts = [statistics.median(run.part_s(name) or 0.0 for run in rounds) for name in names]
        lines.append(
            _row(
                str(batch),
                spread_ms([run.period_s for run in rounds]),
                spread_ms([run.forward_s for run in rounds]),
                *(f"{part * 1e3:.2f} ms" for part in parts),
                spread_percent([outside(run) for run in rounds]),
                f"{limit.step_s * 1e3:.1f} ms",
            )
        )
    return [*lines, ""]


def outside(run: BatchRun) -> float:
    """Return the part of a step, as clients see it, in which no forward runs."""
    return 1 - run.forward_s / run.period_s


def comparison_lines(comparison: Comparison, batch: int, limit: Limit) -> list[str]:
    """Return the table of throughput beside ``generate``."""
    rows = (
        ("chiasm", comparison.engine_s),
        ("`generate` one by one", comparison.one_by_one_s),
        ("`generate` on the padded batch", comparison.padded_s),
    )
    lines = [_row(f"batch {batch}", "tokens/s", "chiasm is faster by"), _rule(3)]
    for name, seconds in rows:
        ratios = [s / own for s, own in zip(seconds, comparison.engine_s, strict=True)]
        rates = [comparison.num_tokens / s for s in seconds]
        lines.append(_row(name, spread(rates, "{:.1f}"), spread(ratios, "{:.2f}")))
    lines.append(_row("limit of decoding", f"{batch / limit.step_s:.0f}", ""))
    return [*lines, ""]


def prefix_lines(cold: Sequence[float], warm: Sequence[float]) -> list[str]:
    """Return the table of TTFT with a prefix that was seen before and with a new one."""
    ratios = [w / c for w, c in zip(warm, cold, strict=True)]
    return [
        _row("prefix", "TTFT"),
        _rule(2),
        _row("new", spread_ms(cold)),
        _row("seen before", spread_ms(warm)),
        _row("ratio", spread(ratios, "{:.3f}")),
        "",
    ]


def scaling_lines(points: Sequence[tuple[float, float]], limit: Limit) -> list[str]:
    """Return the table of the cost of a step by its sequences, and the line through it."""
    line = fit_line(points)
    lines = [_row("sequences", "step", "of the line", "of the limit"), _rule(4)]
    for number, step_s in points:
        lines.append(
            _row(
                f"{number:.0f}",
                f"{step_s * 1e3:.1f} ms",
                f"{step_s / line.at(number):.2f}",
                f"{step_s / limit.step_s:.2f}",
            )
        )
    return [*lines, "", describe(line), ""]


def describe(line: Line) -> str:
    """Return a sentence with the line's numbers."""
    return (
        f"Least squares: {line.intercept * 1e3:.1f} ms + {line.slope * 1e3:.3f} ms per sequence,"
        f" residual {line.residual * 1e3:.1f} ms (root mean square), R² {line.r_squared:.4f}."
    )


def spread(values: Sequence[float], form: str) -> str:
    """Return the median of values with their least and greatest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def spread_ms(seconds: Sequence[float]) -> str:
    """Return ``spread`` in milliseconds."""
    return spread([s * 1e3 for s in seconds], "{:.1f}") + " ms"


def spread_percent(parts: Sequence[float]) -> str:
    """Return ``spread`` in percent."""
    return spread([part * 100 for part in parts], "{:.1f}") + " %"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(number: int) -> str:
    return "|" + "---|" * number
