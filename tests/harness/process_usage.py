"""Watch what processes hold: resident memory, threads and file descriptors."""

from __future__ import annotations

import contextlib
import re
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLE_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its descendants hold together.

    Attributes:
        taken_at: When it was looked at, by ``time.monotonic``.
        rss_bytes: Resident memory; pages that several processes share count in each.
        num_threads: Threads.
        num_descriptors: Open file descriptors, memory files apart.
        num_memory_files: Descriptors of memory files, which hold media on their way to a decoder.
    """

    taken_at: float
    rss_bytes: int
    num_threads: int
    num_descriptors: int
    num_memory_files: int


def read_usage(pid: int) -> Usage:
    """Return what process ``pid`` and its descendants hold now."""
    rss_bytes = num_threads = 0
    descriptors: list[str] = []
    for member in family_of(pid):
        try:
            status = Path(f"/proc/{member}/status").read_text()
            descriptors += _descriptors(member)
        except FileNotFoundError:
            if member == pid:
                raise
            continue  # a worker that was just replaced
        rss_bytes += _field(status, "VmRSS") * 1024
        num_threads += _field(status, "Threads")
    num_memory_files = sum(target.startswith("/memfd:") for target in descriptors)
    num_descriptors = len(descriptors) - num_memory_files
    return Usage(time.monotonic(), rss_bytes, num_threads, num_descriptors, num_memory_files)


class UsageSampler:
    """Looks at named processes all the time, from a thread, while its context is open."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._samples: dict[str, list[Usage]] = {name: [] for name in pids}
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Start to look."""
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop looking; the samples stay."""
        self._is_stopped.set()
        self._thread.join()

    def thirds(self, name: str) -> tuple[list[Usage], list[Usage], list[Usage]]:
        """Return the samples of a process in three parts of equal duration."""
        samples = self._samples[name]
        start, end = samples[0].taken_at, samples[-1].taken_at
        parts: tuple[list[Usage], list[Usage], list[Usage]] = ([], [], [])
        for sample in samples:
            part = int(3 * (sample.taken_at - start) / max(end - start, 1e-9))
            parts[min(part, 2)].append(sample)
        return parts

    def _run(self) -> None:
        while not self._is_stopped.wait(SAMPLE_PAUSE_S):
            for name, pid in self._pids.items():
                self._samples[name].append(read_usage(pid))


def median_rss(samples: list[Usage]) -> float:
    """Return the median resident memory of samples, in bytes."""
    return statistics.median(sample.rss_bytes for sample in samples)


def family_of(pid: int) -> list[int]:
    """Return the ids of process ``pid`` and its descendants, itself first."""
    members = [pid]
    for member in members:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members.extend(int(child) for child in path.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # that thread or worker has ended
    return members


def _descriptors(pid: int) -> list[str]:
    """Return what each open descriptor of a process is."""
    targets = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            targets.append(str(path.readlink()))
    return targets


def _field(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0  # a zombie has no memory
