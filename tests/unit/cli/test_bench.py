"""``chiasm bench`` against servers that answer, break off and fail."""

from __future__ import annotations

import asyncio
import json
import os
import socket

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chiasm.cli import bench
from chiasm.cli.bench import BenchPlan, Series, make_endpoints, markdown, plan_cells
from chiasm.cli.bench_client import Endpoint, Timing
from chiasm.cli.bench_command import run_bench
from chiasm.cli.bench_load import (
    FLOOD,
    FLOOD_CLIENTS,
    FLOOD_STREAMS,
    CellResult,
    RequestSource,
    Sizes,
    measure_cell,
    summarise,
)
from chiasm.cli.bench_machine import ForeignCpu, process_tree, pss_bytes

SIZES = Sizes(num_requests=2, input_tokens=4, output_tokens=3, image_size=56, timeout_s=20.0)
_TEXT = {"choices": [{"delta": {"content": "a"}}]}
_END = {"choices": [{"delta": {}, "finish_reason": "length"}]}
_USAGE = {"choices": [], "usage": {"completion_tokens": 3}}


def _measure(events: list[object], workload: str = "text") -> CellResult:
    num_pictures = 0
    has_flood = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal num_pictures
        if b"image_url" in await request.read():
            num_pictures += 1
            if num_pictures > 2 * FLOOD_CLIENTS:
                has_flood.set()
        elif workload == FLOOD:
            await has_flood.wait()
        response = web.StreamResponse()
        await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return response

    async def run() -> CellResult:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", answer)
        async with TestServer(application) as server:
            endpoint = Endpoint("ours", str(server.make_url("/")), "m")
            return await measure_cell(endpoint, workload, 1, RequestSource(1, SIZES), SIZES)

    return asyncio.run(run())


def _record_cells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure nothing, and return a list to which endpoint and workload of each cell are added."""
    calls: list[str] = []

    async def measure(endpoint: Endpoint, *cell: object) -> CellResult:
        calls.append(f"{endpoint.name} {cell[0]}")
        return CellResult()

    monkeypatch.setattr(bench, "measure_cell", measure)
    return calls


def test_complete_streams_count_tokens_by_usage() -> None:
    result = _measure([_TEXT, _TEXT, _END, _USAGE])
    assert result.errors == []
    assert result.tokens_per_s > 0
    assert result.ttft_s > 0


def test_flood_goes_on_while_texts_are_streamed() -> None:
    result = _measure([_TEXT, _END, _USAGE], FLOOD)
    assert result.errors == []
    assert result.flood_images_per_s > 0


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ([_TEXT, _USAGE], "without a finish reason"),
        ([_TEXT, {"error": {"message": "engine died"}}], "engine died"),
        ([_TEXT, 7], "no object"),
    ],
)
def test_broken_streams_are_told(events: list[object], sentence: str) -> None:
    result = _measure(events)
    assert len(result.errors) == 2
    assert all(sentence in error for error in result.errors)
    assert result.tokens_per_s == 0


def test_dead_endpoint_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    endpoint = Endpoint("dead", f"http://127.0.0.1:{port}", "m")
    result = asyncio.run(measure_cell(endpoint, "text", 1, RequestSource(1, SIZES), SIZES))
    assert len(result.errors) == 2


def test_pace_counts_tokens_and_gaps_count_deltas() -> None:
    timing = Timing(arrivals_s=[1.0, 3.0], num_tokens=5)
    result = summarise([timing], 2.0)
    assert (result.time_per_token_s, result.itl_max_s, result.tokens_per_s) == (0.5, 2.0, 2.5)
    assert summarise([Timing(arrivals_s=[1.0], num_tokens=1)], 2.0).time_per_token_s == 0


def test_memory_and_foreign_work_are_read_of_process_trees() -> None:
    assert os.getpid() in process_tree(os.getppid())
    assert pss_bytes(os.getpid()) > 1 << 20
    assert 0 <= ForeignCpu([]).share() <= 1


def test_each_server_is_selected_before_it_is_measured_and_warmed_up_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = _record_cells(monkeypatch)
    endpoints = make_endpoints(["a=http://x", "b=http://y"], "m", "")
    plan = BenchPlan(endpoints, [("text", 1), ("text", 4)], {}, calls.append)

    bench.run_rounds(plan, 1, SIZES, 1)

    warm_up, rounds = ["a", "a text", "b", "b text"], ["a", "a text", "b", "b text"] * 2
    assert calls == warm_up + rounds


def test_a_server_of_bounded_concurrency_is_left_out_of_cells_above_and_rounds_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = _record_cells(monkeypatch)
    endpoints = [Endpoint("a", "http://x", "m"), Endpoint("b", "http://y", "m", max_concurrency=1)]
    cells = [("text", 1), ("text", 2)]
    plan = BenchPlan(
        endpoints, cells, {}, report=lambda told: calls.append(f"{told.endpoint} told")
    )

    table = bench.run_rounds(plan, 1, SIZES, 1)

    assert calls[2:] == ["a text", "a told", "b text", "b told", "a text", "a told"]
    assert [(series.endpoint, series.concurrency) for series in table] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
    ]


def test_new_pictures_never_repeat_and_the_same_one_does() -> None:
    source = RequestSource(1, SIZES)

    def url(workload: str) -> str:
        return str(source.body(workload)["messages"][0]["content"][0])

    assert url("image-new") != url("image-new")
    assert url("image-same") == url("image-same")


def test_flood_is_one_cell_and_unknown_workloads_are_refused() -> None:
    assert plan_cells(["text", FLOOD], "1,4") == [("text", 1), ("text", 4), (FLOOD, FLOOD_STREAMS)]
    with pytest.raises(ValueError, match="no workload"):
        plan_cells(["sound"], "1")


@pytest.mark.parametrize(
    "flag",
    ["rounds", "requests", "input-tokens", "output-tokens", "image-size", "timeout-s"],
)
@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many"])
def test_numbers_that_are_not_positive_are_refused(
    flag: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_bench(["http://127.0.0.1:1", "--model", "m", f"--{flag}={number}"])

    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"argument --{flag}: '{number}' is no whole number of at least 1" in error


def test_urls_may_have_names_and_models() -> None:
    first, second = make_endpoints(["a=http://x", "b=http://y"], "a=m,b=n", "")
    assert (first.url, first.model, second.model) == ("http://x", "m", "n")


def test_table_has_ratios_and_errors() -> None:
    rows = [
        Series(name, "text", 1, [CellResult(ttft_s=ttft, errors=errors)], [0.0])
        for name, ttft, errors in (("a", 0.1, []), ("b", 0.2, ["it broke"]))
    ]
    table = markdown(rows)
    assert "200.0 (200.0..200.0) 2.00x" in table
    assert "b, text c1: 1 x it broke" in table
