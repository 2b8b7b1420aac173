"""What a Redis that is dead, hung or failed over costs: latencies and times, with their bars.

Runs a real stack on a tiny random checkpoint, so that whatever the store adds weighs most, asks it
about pictures that it does not know, and prints one run::

    python -m benchmarks.store_faults

A dead or hung Redis is compared with the mean of the medians before and after it. The lag of the
gateway's event loop is seen from outside, as the time of ``/health`` while the same load runs; that
time holds the work of this process too, so it stands beside the same figure with Redis in order.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.common.guarded_redis import CallBudget
from tests.fakes.checkpoints import make_qwen2_vl
from tests.harness import chat
from tests.harness.faulty_stack import FaultyStack, body_of, dead, stopped, wait_until_stored
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUDGET_S = CallBudget().base_s
LOAD_S = 8.0
NUM_CLIENTS = 2
NUM_FAILOVERS = 5
READ_ONLY_S = 2.0
HEALTH_PAUSE_S = 0.01
LAG_BAR_S = 0.02


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds of each request about a new picture, of each look at ``/health``, and failures."""

    answer_s: list[float]
    health_s: list[float]
    num_errors: int

    @property
    def p50_s(self) -> float:
        """Median of the answers, in seconds."""
        return statistics.median(self.answer_s)


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: what was measured, against what, and whether it is within its bar."""

    fault: str
    what: str
    value: str
    bar: str
    is_within: bool


def main() -> None:
    """Run all faults and print the table."""
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--dtype", "float32", "--embedding-cache-bytes", "0"]
        flags += ["--store-timeout-s", str(BUDGET_S)]
        stack = Stack(make_qwen2_vl(Path(directory) / "model"), flags)
        faulty = FaultyStack(stack)
        try:
            _load(faulty)  # warms up
            for measure in (_dead, _hung, _failed_over):
                for figure in measure(faulty):
                    _print_row(figure)
        finally:
            faulty.redis.close()
            stack.stop()


def _dead(faulty: FaultyStack) -> Iterator[Figure]:
    before = _load(faulty)
    with dead(faulty):
        without = _load(faulty)
    window_s = wait_until_stored(faulty)
    after = _load(faulty)
    sound_s = (before.p50_s + after.p50_s) / 2
    added = without.p50_s / sound_s - 1
    value = f"{without.p50_s * 1e3:.1f} ms against {sound_s * 1e3:.1f} ms, {added:+.0%}"
    yield Figure("F8", "p50 without Redis", value, "< +20 %", added < 0.2)
    yield _errors("F8", without)
    yield Figure("F8", "stored again after", f"{window_s:.2f} s", "< 3 s", window_s < 3)


def _hung(faulty: FaultyStack) -> Iterator[Figure]:
    before = _load(faulty)
    with stopped(faulty, "redis"):
        hung = _load(faulty)
    window_s = wait_until_stored(faulty)
    added_s = _p99(hung.answer_s) - before.p50_s
    value = f"{added_s * 1e3:.0f} ms, max {(max(hung.answer_s) - before.p50_s) * 1e3:.0f} ms"
    bar_s = 2 * BUDGET_S
    yield Figure("F9", "added p99", value, f"< {bar_s * 1e3:.0f} ms", added_s < bar_s)
    yield _errors("F9", hung)
    sound_s, hung_s = _p99(before.health_s), _p99(hung.health_s)
    value = f"{hung_s * 1e3:.1f} ms against {sound_s * 1e3:.1f} ms"
    is_within = hung_s - sound_s < LAG_BAR_S
    yield Figure("F9", "p99 of /health", value, f"< +{LAG_BAR_S * 1e3:.0f} ms", is_within)
    yield Figure("F9", "stored again after", f"{window_s:.2f} s", "< 3 s", window_s < 3)


def _failed_over(faulty: FaultyStack) -> Iterator[Figure]:
    windows_s, num_errors, num_answers = [], 0, 0
    for _ in range(NUM_FAILOVERS):
        faulty.redis.slaveof("127.0.0.1", 1)
        load = _load(faulty, READ_ONLY_S)
        faulty.redis.slaveof()
        windows_s.append(wait_until_stored(faulty))
        num_errors += load.num_errors
        num_answers += len(load.answer_s)
    worst_s = max(windows_s)
    value = f"{statistics.median(windows_s):.2f} s, max {worst_s:.2f} s of {NUM_FAILOVERS}"
    yield Figure("F12", "stored again after", value, "< 3 s", worst_s < 3)
    yield Figure("F12", "errors", f"{num_errors} of {num_answers}", "0", not num_errors)


def _load(faulty: FaultyStack, load_s: float = LOAD_S) -> Load:
    """Let clients ask one request after the other for ``load_s`` seconds."""
    deadline = time.monotonic() + load_s
    answer_s: list[float] = []
    health_s: list[float] = []
    errors: list[OSError] = []

    def ask() -> None:
        body = body_of(faulty.new_picture())
        try:
            chat.post_chat(faulty.stack.base_url, body)
        except OSError as error:
            errors.append(error)

    def look() -> None:
        with urllib.request.urlopen(f"{faulty.stack.base_url}/health", timeout=10.0):
            pass

    def repeat(act: Callable[[], None], seconds: list[float], pause_s: float = 0.0) -> None:
        while (started := time.monotonic()) < deadline:
            act()
            seconds.append(time.monotonic() - started)
            threading.Event().wait(pause_s)

    with ThreadPoolExecutor(NUM_CLIENTS + 1) as pool:
        works = [pool.submit(repeat, ask, answer_s) for _ in range(NUM_CLIENTS)]
        works.append(pool.submit(repeat, look, health_s, HEALTH_PAUSE_S))
        for work in works:
            work.result()
    return Load(answer_s, health_s, len(errors))


def _errors(fault: str, load: Load) -> Figure:
    value = f"{load.num_errors} of {len(load.answer_s)}"
    return Figure(fault, "errors", value, "0", not load.num_errors)


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def _print_row(figure: Figure) -> None:
    verdict = "pass" if figure.is_within else "FAIL"
    sys.stdout.write(
        f"{figure.fault:4s} {figure.what:20s} {figure.value:40s} {figure.bar:10s} {verdict}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
