"""Watch what processes hold: resident memory, threads and file descriptors."""

from __future__ import annotations

import contextlib
import re
import socket
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLE_PAUSE_S = 0.2
_LISTENING = "0A"


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


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    """Return host and port of every TCP socket that a process or a descendant listens on."""
    targets = {target for member in family_of(pid) for target in _descriptors(member)}
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in targets:
                host, _, port = fields[1].partition(":")
                found.add((_host_of(host, family), int(port, 16)))
    return found


def forget_peaks(pid: int) -> None:
    """Have the kernel note the peak memory of process ``pid`` and its descendants afresh."""
    for member in family_of(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            Path(f"/proc/{member}/clear_refs").write_text("5")


def read_peak(pid: int) -> int:
    """Return the sum of the peaks of resident memory of a process and its descendants, in bytes."""
    peak_bytes = 0
    for member in family_of(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{member}/status").read_text()
            peak_bytes += _field(status, "VmHWM") * 1024
    return peak_bytes


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


def _host_of(text: str, family: socket.AddressFamily) -> str:
    # The kernel writes the address in words of the host's byte order.
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    return socket.inet_ntop(family, b"".join(word.to_bytes(4, sys.byteorder) for word in words))


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
