"""What a Redis that is dead or hung costs the requests of a stack, in time.

Sends new pictures one after the other, a round with Redis and a round without, and prints medians
and spread of one run with the bar beside each figure::

    python -m benchmarks.store_faults
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.fakes.checkpoints import TowerSizes, make_qwen2_vl
from tests.harness.faulty_stack import FaultyStack, wait_until_stored
from tests.harness.stack import Stack

NUM_ROUNDS = 5
NUM_PICTURES = 20
# So many are answered before the supervisor has started another Redis.
NUM_BEFORE_RESTART = 4
# As ``chiasm up`` has it by itself.
STORE_TIMEOUT_S = 0.25
TOWER = TowerSizes(depth=12, embed_dim=512, num_heads=8)


def main() -> None:
    """Run all cells and print the table."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_qwen2_vl(Path(directory) / "model", tower=TOWER)
        flags = ["--embedding-cache-bytes", "0", "--store-timeout-s", str(STORE_TIMEOUT_S)]
        stack = Stack(model, flags)
        faulty = FaultyStack(stack)
        try:
            _print_rows(faulty)
        finally:
            stack.stop()


def _print_rows(faulty: FaultyStack) -> None:
    _time_pictures(faulty)
    healthy, dead, hung, failover = [], [], [], []
    for _ in range(NUM_ROUNDS):
        healthy += _time_pictures(faulty)
        faulty.stack.kill("redis")
        dead += _time_pictures(faulty, NUM_BEFORE_RESTART)
        faulty.stack.wait_until_ready("redis")
        wait_until_stored(faulty)
        pid = faulty.stack.kill("redis", signal.SIGSTOP)
        hung += _time_pictures(faulty)
        os.kill(pid, signal.SIGCONT)
        wait_until_stored(faulty)
        faulty.redis.slaveof("127.0.0.1", 1)
        _time_pictures(faulty)
        faulty.redis.slaveof()
        failover.append(wait_until_stored(faulty))
    base = statistics.median(healthy)
    added = [max(0.0, seconds - base) for seconds in hung]
    percentile = statistics.quantiles(added, n=100)[98]
    rows = [
        ("picture, Redis well", _spread(healthy), ""),
        ("picture, Redis dead", _spread(dead), f"{_more(dead, base)} (F8: below +20 %)"),
        ("picture, Redis hung", _spread(hung), _more(hung, base)),
        (
            "added by a hung Redis, 99th percentile",
            f"{percentile * 1e3:.0f} ms",
            f"F9: below {2 * STORE_TIMEOUT_S * 1e3:.0f} ms, twice the budget",
        ),
        ("stored again after a failover", _spread(failover), "F12: below 3,000 ms"),
    ]
    sys.stdout.write("| | median (least to most) | bar |\n|---|---|---|\n")
    for row in rows:
        sys.stdout.write("| " + " | ".join(row) + " |\n")


def _more(seconds: list[float], base: float) -> str:
    return f"{statistics.median(seconds) / base - 1:+.1%}"


def _time_pictures(faulty: FaultyStack, num_pictures: int = NUM_PICTURES) -> list[float]:
    times = []
    for _ in range(num_pictures):
        picture = faulty.new_picture()
        started = time.perf_counter()
        faulty.ask(picture)
        times.append(time.perf_counter() - started)
    return times


def _spread(seconds: list[float]) -> str:
    middle, least, most = (f(seconds) * 1e3 for f in (statistics.median, min, max))
    return f"{middle:.0f} ({least:.0f} to {most:.0f}) ms"


if __name__ == "__main__":
    main()
