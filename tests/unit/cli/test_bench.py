"""``chiasm bench`` against servers that answer, break off and fail."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chiasm.cli.bench import Series, make_endpoints, markdown, plan_cells
from chiasm.cli.bench_client import Endpoint, Timing
from chiasm.cli.bench_load import (
    FLOOD,
    FLOOD_STREAMS,
    CellResult,
    RequestSource,
    Sizes,
    measure_cell,
    summarise,
)

SIZES = Sizes(num_requests=2, input_tokens=4, output_tokens=3, image_size=56, timeout_s=20.0)
_TEXT = {"choices": [{"delta": {"content": "a"}}]}
_END = {"choices": [{"delta": {}, "finish_reason": "length"}]}
_USAGE = {"choices": [], "usage": {"completion_tokens": 3}}


def _measure(events: list[object], workload: str = "text") -> CellResult:
    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
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


def test_complete_streams_count_tokens_by_usage() -> None:
    result = _measure([_TEXT, _TEXT, _END, _USAGE])
    assert result.errors == []
    assert result.tokens_per_s > 0
    assert result.ttft_s > 0


def test_flood_counts_pictures() -> None:
    result = _measure([_TEXT, _END, _USAGE], FLOOD)
    assert result.errors == []
    assert result.flood_images_per_s >= 0


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ([_TEXT, _USAGE], "without a finish reason"),
        ([_TEXT, {"error": {"message": "engine died"}}], "engine died"),
    ],
)
def test_broken_streams_are_told(events: list[object], sentence: str) -> None:
    result = _measure(events)
    assert len(result.errors) == 2
    assert all(sentence in error for error in result.errors)
    assert result.tokens_per_s == 0


def test_dead_endpoint_is_told() -> None:
    endpoint = Endpoint("dead", "http://127.0.0.1:9", "m")
    result = asyncio.run(measure_cell(endpoint, "text", 1, RequestSource(1, SIZES), SIZES))
    assert len(result.errors) == 2


def test_tokens_of_one_delta_are_zero_apart() -> None:
    timing = Timing(arrivals_s=[1.0, 3.0], num_tokens=4)
    assert sorted(timing.gaps_s()) == [0.0, 0.0, 2.0]
    assert summarise([timing], 2.0).itl_max_s == 2.0


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
