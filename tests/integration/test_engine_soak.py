"""Mixed load for minutes: memory settles, and at the end nothing is held any more."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import pytest

from tests.fakes.checkpoints import make_qwen2_vl
from tests.harness.mixed_load import CANCELLED_TURNS, LEFT_TURNS, REFUSED_TURNS, ROUND, MixedLoad
from tests.harness.process_usage import UsageSampler, median_rss, read_usage
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

SERVICES = ("redis", "encoder-0", "generator", "gateway")
# Few blocks, so that the whole cache has been touched long before memory is compared.
FLAGS = ("--num-blocks", "256", "--redis-max-memory-mib", "64")
NUM_WORKERS = 8
# Pools of connections and workers fill on demand: the warm-up demands more than the soak does.
NUM_WARM_UP_WORKERS = 32
IDLE_TIMEOUT_S = 5.0
POLL_PAUSE_S = 0.1
IDLE_METRICS = (
    ("gateway", "chiasm_gateway_inflight_requests"),
    ("generator", "vllm:num_requests_running"),
    ("generator", "vllm:num_requests_waiting"),
    ("generator", "chiasm_generator_blocks_used"),
    ("generator", "chiasm_generator_queue_tokens"),
    ("encoder-0", "chiasm_encoder_queue_pixels"),
)


@dataclass(frozen=True, slots=True)
class Soak:
    """How long it takes.

    Attributes:
        warm_up_s: Seconds of load before descriptors and threads are counted.
        duration_s: Seconds of load while memory is watched.
    """

    warm_up_s: float
    duration_s: float


@pytest.fixture
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(make_qwen2_vl(tmp_path_factory.mktemp("model")), FLAGS)
    yield running
    assert running.stop() == 0


def busy_metrics(stack: Stack) -> dict[str, float]:
    values = {name: stack.metric(name, service) for service, name in IDLE_METRICS}
    return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class Held:
    """What a service holds while nothing is asked of it."""

    num_descriptors: int
    num_memory_files: int
    num_tasks: int


def read_held(stack: Stack, name: str) -> Held:
    usage = read_usage(stack.pid(name))
    # Redis is not ours and has no tasks.
    num_tasks = 0 if name == "redis" else int(stack.metric("chiasm_process_tasks", name))
    return Held(usage.num_descriptors, usage.num_memory_files, num_tasks)


def wait_until_idle(stack: Stack, start: dict[str, Held]) -> dict[str, object]:
    """Return what is still held once nothing is, or after a while."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        held: dict[str, object] = dict(busy_metrics(stack))
        for name, before in start.items():
            now = read_held(stack, name)
            for field in fields(Held):
                if getattr(now, field.name) > getattr(before, field.name):
                    held[f"{field.name} of {name}"] = f"{now}, at the start {before}"
        if not held or time.monotonic() > deadline:
            return held
        threading.Event().wait(POLL_PAUSE_S)


def crashes(stack: Stack) -> list[str]:
    """Return the lines of all logs that tell of an error nobody expected."""
    logs = stack.state_dir.rglob("*.log")
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [line for line in lines if "Traceback" in line or '"level": "error"' in line]


def run_soak(stack: Stack, soak: Soak) -> dict[str, float]:
    """Check what each service holds behind the load.

    Returns:
        By service, the last third's median memory as a multiple of the middle third's.
    """
    asyncio.run(MixedLoad(stack.base_url, 1).run(soak.warm_up_s, NUM_WARM_UP_WORKERS))
    assert wait_until_idle(stack, {}) == {}
    pids = {name: stack.pid(name) for name in SERVICES}
    start = {name: read_held(stack, name) for name in SERVICES}
    threads = {name: read_usage(pid).num_threads for name, pid in pids.items()}

    load = MixedLoad(stack.base_url, 1)
    with UsageSampler(pids) as sampler:
        asyncio.run(load.run(soak.duration_s, NUM_WORKERS))

    check_answers(load)
    assert wait_until_idle(stack, start) == {}
    assert crashes(stack) == []
    assert {name: stack.pid(name) for name in SERVICES} == pids
    growth = {}
    for name in SERVICES:
        first, middle, last = sampler.thirds(name)
        growth[name] = median_rss(last) / median_rss(middle)
        # Pools fill on demand, so the start may be below their size; a leak grows to the end.
        most_threads = max(threads[name], *(usage.num_threads for usage in (*first, *middle)))
        assert read_usage(pids[name]).num_threads <= most_threads, f"threads of {name}"
    return growth


def check_answers(load: MixedLoad) -> None:
    assert set(load.counts) == {"complete", "cancelled", "left", "refused"}, load.counts
    num_rounds = load.counts.total() // ROUND
    assert num_rounds >= 1
    assert load.counts["cancelled"] >= num_rounds * len(CANCELLED_TURNS)
    assert load.counts["left"] >= num_rounds * len(LEFT_TURNS)
    assert load.counts["refused"] >= num_rounds * len(REFUSED_TURNS)


@pytest.mark.timeout(120)
def test_mixed_load_leaves_nothing_behind(stack: Stack) -> None:
    # Memory has not settled after seconds: this catches what leaks with every request.
    growth = run_soak(stack, Soak(warm_up_s=2.0, duration_s=6.0))

    assert max(growth.values()) <= 1.1, growth


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_settles_in_five_minutes_of_mixed_load(stack: Stack) -> None:
    growth = run_soak(stack, Soak(warm_up_s=5.0, duration_s=300.0))

    assert max(growth.values()) <= 1.02, growth
