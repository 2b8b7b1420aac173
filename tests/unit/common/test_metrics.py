"""Names and exposition of the metrics."""

from __future__ import annotations

import asyncio
import re
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from chiasm.common import metrics

OURS = re.compile(r"chiasm_(gateway|encoder|generator|store|process)_[a-z_]+")


def all_metrics() -> dict[str, MetricWrapperBase]:
    return {
        name: value for name, value in vars(metrics).items() if isinstance(value, MetricWrapperBase)
    }


def test_there_are_metrics() -> None:
    assert len(all_metrics()) > 40


@pytest.mark.parametrize("name", all_metrics())
def test_name_is_ours_or_one_that_dashboards_know(name: str) -> None:
    (family,) = list(all_metrics()[name].describe())

    assert OURS.fullmatch(family.name) or family.name.startswith(("vllm:", "http_request"))


@pytest.mark.parametrize("name", all_metrics())
def test_help_is_a_sentence_and_times_are_in_seconds(name: str) -> None:
    (family,) = list(all_metrics()[name].describe())

    assert family.documentation.endswith(".")
    assert not re.search(r"_(ms|millis|kb|mb|minutes)(_|$)", family.name)


@pytest.mark.parametrize("name", all_metrics())
def test_histogram_buckets_rise(name: str) -> None:
    metric = all_metrics()[name]
    assert isinstance(metric, Counter | Gauge | Histogram)
    if isinstance(metric, Histogram):
        bounds = metric._upper_bounds
        assert list(bounds) == sorted(set(bounds))


def test_labels_never_hold_a_request() -> None:
    labels = {label for metric in all_metrics().values() for label in metric._labelnames}

    assert labels.isdisjoint({"request_id", "tenant", "uuid", "url", "user"})


def test_server_exposes_what_was_counted_and_stops() -> None:
    metrics.STORE_BYPASSES.labels(why="test").inc(3)
    stop = metrics.start_metrics_server(port := _free_port(), "127.0.0.1:0")

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    stop()

    values = {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if sample.labels == {"why": "test"}
    }
    assert values["chiasm_store_bypasses_total"] >= 3
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_port_that_is_taken_is_one_sentence() -> None:
    stop = metrics.start_metrics_server(port := _free_port(), "127.0.0.1:0")

    with pytest.raises(metrics.MetricsPortError, match=f"The metrics port {port} of 127.0.0.1"):
        metrics.start_metrics_server(port, "127.0.0.1:0")
    stop()
    with pytest.raises(metrics.MetricsPortError, match="65535"):
        metrics.start_metrics_server(70000, "127.0.0.1:0")


async def test_tasks_of_the_loop_are_counted() -> None:
    metrics.watch_loop()
    before = _value("chiasm_process_tasks")

    task = asyncio.create_task(asyncio.Event().wait())
    while_it_runs = _value("chiasm_process_tasks")
    task.cancel()
    await asyncio.wait([task])

    assert while_it_runs == before + 1
    assert _value("chiasm_process_tasks") == before


async def test_a_blocked_loop_is_late() -> None:
    metrics.watch_loop()
    before = _num_late()

    threading.Event().wait(0.3)  # blocks the loop for longer than the bound below
    async with asyncio.timeout(10):
        while _num_late() == before:  # noqa: ASYNC110 - a histogram wakes nobody
            await asyncio.sleep(0.01)

    assert _num_late() > before


def _num_late() -> float:
    """Return how often the loop was more than 0.2 s late."""
    name = "chiasm_process_loop_lag_seconds"
    return _value(f"{name}_count") - _value(f"{name}_bucket", {"le": "0.2"})


def _value(name: str, labels: dict[str, str] | None = None) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, name
    return value


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
