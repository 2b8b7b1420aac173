"""Share the cores of one host between services: a page with one busy word each.

Before each layer of a forward a service takes its even share of the cores, as many threads as
``max(1, cores // (1 + busy peers))``. The page is a small file that all services of the host map;
it needs no server and survives any of them.

::

    offset 0     magic, 8 bytes; zeros to offset 64
    offset 64    slot 0, 64 bytes
    offset 128   slot 1, ...

    slot         pid u64 | start of that process in clock ticks u64 | busy u8 | name, 32 bytes

A slot belongs to the process whose pid and start time it holds; pid 0 is free. Slots change hands
only under the file's lock; the busy byte is written by its owner without one. Invariant: the busy
byte of a dead process counts for nothing, because its pid and start time name no process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAGIC = b"CHIASMC1"
_SLOT_BYTES = 64
_NUM_SLOTS = 128
_PAGE_BYTES = _SLOT_BYTES * (_NUM_SLOTS + 1)
_OWNER = struct.Struct("<QQ")
_BUSY_OFFSET = 16
_NAME_OFFSET = 17
_NAME_BYTES = 32
_LIVENESS_PERIOD_S = 0.5


class CorePageError(Exception):
    """The core page cannot be used: not a page, not writable, or every slot is taken."""


class Cores(Protocol):
    """What a service asks before it computes."""

    def set_busy(self, is_busy: bool) -> None:
        """Tell peers whether this service is computing."""

    def available_threads(self) -> int:
        """Return how many threads to use now; at least 1."""


class FixedCores:
    """Cores of a service that shares no page: always the same number of threads."""

    def __init__(self, cores: int | None = None) -> None:
        """Build with ``cores`` threads; ``None`` takes all that this process may use."""
        self._cores = cores or count_cores()

    def set_busy(self, is_busy: bool) -> None:
        """Do nothing: nobody looks."""

    def available_threads(self) -> int:
        """Return the fixed number of threads."""
        return self._cores


class CorePage:
    """The shared page; open it once per process and claim one slot."""

    def __init__(
        self, path: Path, cores: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the page, making it first if there is none.

        Args:
            path: File of the page; all services of the host name the same one.
            cores: Cores to share; ``None`` takes all that this process may use.
            clock: Source of seconds for the liveness cache; injected by tests.

        Raises:
            CorePageError: The file cannot be opened or is something else.
        """
        self._cores = cores or count_cores()
        self._clock = clock
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CorePageError(f"The core page {path} cannot be opened: {error.strerror}.") from (
                error
            )
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._initialise(path)
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._page = mmap.mmap(self._file, _PAGE_BYTES)
        except BaseException:
            os.close(self._file)
            raise

    def claim(self, service: str) -> CoreSlot:
        """Return a slot of this process, not busy yet.

        Args:
            service: Name that people see in the page; at most 32 bytes count.

        Raises:
            CorePageError: Every slot belongs to a living process.
        """
        pid = os.getpid()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            for start in _slot_offsets():
                owner = _OWNER.unpack_from(self._page, start)
                if owner[0] and _start_ticks(owner[0]) == owner[1]:
                    continue
                self._page[start + _BUSY_OFFSET] = 0
                name = service.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
                self._page[start + _NAME_OFFSET : start + _NAME_OFFSET + _NAME_BYTES] = name
                _OWNER.pack_into(self._page, start, pid, _start_ticks(pid) or 0)
                return CoreSlot(self._page, start, self._cores, self._clock)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        raise CorePageError(f"All {_NUM_SLOTS} slots of the core page are taken.")

    def close(self) -> None:
        """Unmap the page; slots claimed from it must not be used any more."""
        self._page.close()
        os.close(self._file)

    def _initialise(self, path: Path) -> None:
        found = os.pread(self._file, len(_MAGIC), 0)
        if not found:
            os.ftruncate(self._file, _PAGE_BYTES)
            os.pwrite(self._file, _MAGIC, 0)
        elif found != _MAGIC or os.fstat(self._file).st_size != _PAGE_BYTES:
            raise CorePageError(f"The file {path} is not a core page.")


class CoreSlot:
    """This process's word on the page, and its view of the others."""

    def __init__(self, page: mmap.mmap, start: int, cores: int, clock: Callable[[], float]) -> None:
        self._page = page
        self._start = start
        self._cores = cores
        self._clock = clock
        self._last_checks: dict[int, _LivenessCheck] = {}

    def set_busy(self, is_busy: bool) -> None:
        """Tell peers whether this service is computing."""
        self._page[self._start + _BUSY_OFFSET] = int(is_busy)

    def available_threads(self) -> int:
        """Return the even share of the cores; a dead peer is noticed within half a second."""
        # Mostly nobody else is busy, and that is one look.
        busy = self._page[_SLOT_BYTES + _BUSY_OFFSET :: _SLOT_BYTES]
        own = self._page[self._start + _BUSY_OFFSET]
        if busy.count(0) == len(busy) - own:
            return self._cores
        return max(1, self._cores // (1 + sum(1 for _ in self._busy_peers())))

    def release(self) -> None:
        """Give the slot back."""
        self.set_busy(False)
        _OWNER.pack_into(self._page, self._start, 0, 0)

    def _busy_peers(self) -> Iterator[int]:
        for start in _slot_offsets():
            if start == self._start or not self._page[start + _BUSY_OFFSET]:
                continue
            pid, started_at = _OWNER.unpack_from(self._page, start)
            if pid and self._is_alive(start, pid, started_at):
                yield start

    def _is_alive(self, start: int, pid: int, started_at: int) -> bool:
        now = self._clock()
        last = self._last_checks.get(start)
        if last and last.pid == pid and now - last.checked_at < _LIVENESS_PERIOD_S:
            return last.is_alive
        is_alive = _start_ticks(pid) == started_at
        self._last_checks[start] = _LivenessCheck(pid, now, is_alive)
        return is_alive


@dataclass(frozen=True, slots=True)
class _LivenessCheck:
    pid: int
    checked_at: float
    is_alive: bool


def open_cores(page: Path | None, service: str, cores: int | None = None) -> Cores:
    """Return a slot of the shared page, or fixed cores if there is no page.

    Raises:
        CorePageError: The page cannot be used.
    """
    return FixedCores(cores) if page is None else CorePage(page, cores).claim(service)


def count_cores() -> int:
    """Return the cores that this process may use: its affinity, cut by the container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return allowed
    if quota == "max":
        return allowed
    return max(1, min(allowed, int(quota) // int(period)))


def _slot_offsets() -> range:
    return range(_SLOT_BYTES, _PAGE_BYTES, _SLOT_BYTES)


def _start_ticks(pid: int) -> int | None:
    """Return when the process started, in clock ticks since boot; ``None`` if it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may hold anything; the fields after it are fixed.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
