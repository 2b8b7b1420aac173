"""Read from ``/proc`` what processes use; Linux only."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def process_tree(root: int) -> list[int]:
    """Return ``root`` and all its descendants."""
    parents: dict[int, int] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat_fields(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    tree = [root]
    for pid in tree:
        tree.extend(child for child, parent in parents.items() if parent == pid)
    return tree


def pss_bytes(root: int) -> int:
    """Return the proportional set size of a process tree; 0 for what cannot be read."""
    total = 0
    for pid in process_tree(root):
        try:
            text = (_PROC / str(pid) / "smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    return total * 1024


class ForeignCpu:
    """The share of all cores that others used between making this and :meth:`share`."""

    def __init__(self, roots: list[int]) -> None:
        """Take the process trees that are no others; the caller's process is added."""
        self._roots = [*roots, os.getpid()]
        self._busy, self._total = _machine_ticks()
        self._own = self._own_ticks()

    def share(self) -> float:
        """Return the share, 0 to 1."""
        busy, total = _machine_ticks()
        foreign = busy - self._busy - (self._own_ticks() - self._own)
        return min(1.0, max(0.0, foreign / max(1, total - self._total)))

    def _own_ticks(self) -> int:
        pids = {pid for root in self._roots for pid in process_tree(root)}
        stats = [_stat_fields(pid) for pid in pids]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats if fields)


def _machine_ticks() -> tuple[int, int]:
    line = (_PROC / "stat").read_text().splitlines()[0]
    ticks = [int(value) for value in line.split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` after the name; none if the process is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
