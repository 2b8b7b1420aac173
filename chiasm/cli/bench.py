"""``chiasm bench``: measure OpenAI-compatible servers in interleaved rounds."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from chiasm.cli.bench_client import Endpoint
from chiasm.cli.bench_load import (
    FLOOD,
    FLOOD_STREAMS,
    WORKLOADS,
    CellResult,
    RequestSource,
    Sizes,
    measure_cell,
)
from chiasm.cli.bench_machine import ForeignCpu, pss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_FIGURES = (
    ("ttft_s", "TTFT ms", 1000.0),
    ("time_per_token_s", "ms/token", 1000.0),
    ("itl_p99_s", "ITL p99 ms", 1000.0),
    ("itl_max_s", "ITL max ms", 1000.0),
    ("tokens_per_s", "tokens/s", 1.0),
    ("flood_images_per_s", "flood images/s", 1.0),
)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to measure.

    Attributes:
        endpoints: The servers.
        cells: Workloads and their concurrency.
        pids: Root process of endpoints, by name.
        select: Called with the name of the endpoint that is measured next.
        report: Called with the series to which a round was added.
    """

    endpoints: list[Endpoint]
    cells: list[tuple[str, int]]
    pids: dict[str, int]
    select: Callable[[str], None] = lambda name: None
    report: Callable[[Series], None] = lambda series: None


@dataclass(slots=True)
class Series:
    """All rounds of one endpoint in one cell; ``foreign_cpu`` 0 to 1 of all cores."""

    endpoint: str
    workload: str
    concurrency: int
    rounds: list[CellResult] = field(default_factory=list)
    foreign_cpu: list[float] = field(default_factory=list)
    pss_bytes: int = 0


def make_endpoints(urls: list[str], model: str, api_key: str) -> list[Endpoint]:
    """Return the endpoints of ``URL`` or ``NAME=URL``; ``model`` may be ``NAME=MODEL,...``.

    Raises:
        ValueError: Two have one name, or one has no model.
    """
    models = dict(item.split("=", 1) for item in model.split(",")) if "=" in model else {}
    endpoints: dict[str, Endpoint] = {}
    for url in urls:
        name, separator, address = url.partition("=")
        if not separator or "://" in name:
            name, address = url, url
        if name in endpoints or (models and name not in models):
            raise ValueError(f"{name} is named twice, or --model has no model for it")
        endpoints[name] = Endpoint(name, address, models.get(name, model), api_key)
    return list(endpoints.values())


def plan_cells(workloads: list[str], concurrency: str) -> list[tuple[str, int]]:
    """Return the cells; a flood is one cell, for its two streams.

    Raises:
        ValueError: A workload or number is none.
    """
    if unknown := set(workloads) - set(WORKLOADS):
        raise ValueError(f"{min(unknown)} is no workload; there are {', '.join(WORKLOADS)}")
    numbers = [int(number) for number in concurrency.split(",")]
    if min(numbers) < 1:
        raise ValueError("--concurrency must be at least 1")
    return [
        (workload, number)
        for workload in workloads or WORKLOADS
        for number in ([FLOOD_STREAMS] if workload == FLOOD else numbers)
    ]


def run_rounds(plan: BenchPlan, num_rounds: int, sizes: Sizes, seed: int) -> list[Series]:
    """Measure every endpoint on a cell before the next cell, ``num_rounds`` times over."""
    table = {
        (cell, endpoint.name): Series(endpoint.name, *cell)
        for cell in plan.cells
        for endpoint in plan.endpoints
        if endpoint.is_measured_at(cell[1])
    }
    source = RequestSource(seed, sizes)
    for endpoint in plan.endpoints:
        # What the first request of a kind pays, no round shall pay.
        plan.select(endpoint.name)
        for workload in dict(plan.cells):
            kind = "image-new" if workload == FLOOD else workload
            asyncio.run(measure_cell(endpoint, kind, 1, source, replace(sizes, num_requests=1)))
    for _ in range(num_rounds):
        for cell in plan.cells:
            for endpoint in plan.endpoints:
                if (series := table.get((cell, endpoint.name))) is None:
                    continue
                plan.select(endpoint.name)
                measured = plan.pids.get(endpoint.name)
                # What the other servers do meanwhile is foreign, too.
                foreign = ForeignCpu([] if measured is None else [measured])
                series.rounds.append(asyncio.run(measure_cell(endpoint, *cell, source, sizes)))
                series.foreign_cpu.append(foreign.share())
                if measured is not None:
                    series.pss_bytes = max(series.pss_bytes, pss_bytes(measured))
                plan.report(series)
    return list(table.values())


def markdown(table: list[Series]) -> str:
    """Return the table: medians (min..max) over rounds, and ratios to the first endpoint."""
    heads = ["cell", "endpoint", *(head for _, head, _ in _FIGURES)]
    heads += ["foreign CPU", "PSS GiB", "errors"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    first: dict[tuple[str, int], Series] = {}
    notes = []
    for series in table:
        base = first.setdefault((series.workload, series.concurrency), series)
        cell = f"{series.workload} c{series.concurrency}"
        pss = f"{series.pss_bytes / 2**30:.2f}" if series.pss_bytes else "-"
        errors = [error for result in series.rounds for error in result.errors]
        row = [cell, series.endpoint]
        row += [_figure(series, base, name, scale) for name, _, scale in _FIGURES]
        row += [f"{statistics.median(series.foreign_cpu):.0%}", pss, str(len(errors))]
        lines.append(f"| {' | '.join(row)} |")
        for error in sorted(set(errors)):
            notes.append(f"{series.endpoint}, {cell}: {errors.count(error)} x {error}")
    return "\n".join([*lines, "", *notes])


def as_json(table: list[Series]) -> list[dict[str, object]]:
    """Return every round as plain values."""
    return [dataclasses.asdict(series) for series in table]


def _values(series: Series, name: str) -> list[float]:
    values = [float(getattr(result, name)) for result in series.rounds]
    return [value for value in values if value > 0]


def _figure(series: Series, base: Series, name: str, scale: float) -> str:
    values = [value * scale for value in _values(series, name)]
    if not values:
        return "-"
    middle = statistics.median(values)
    text = f"{middle:.1f} ({min(values):.1f}..{max(values):.1f})"
    base_values = [value * scale for value in _values(base, name)]
    if base is series or not base_values:
        return text
    return f"{text} {middle / statistics.median(base_values):.2f}x"
