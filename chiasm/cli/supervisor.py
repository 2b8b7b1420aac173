"""Keep the services of a local stack running: start in order, restart what dies, stop in order.

Lifecycle of one service::

    waiting for what it depends on → starting → ready → (ended → pause → starting) ... → stopped

A service that ends before it was ever ready stops the whole start after a few attempts, at once if
it says that its configuration is wrong (status 2). Once it was ready it is restarted for as long as
the stack runs, with pauses that grow while it keeps dying.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.cli.child import Child, ServiceSpec
from chiasm.cli.console import Console, LogLine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

_CONFIG_ERROR_STATUS = 2
_NUM_LAST_LINES = 20


class StartError(Exception):
    """A service could not be brought up; the stack has been stopped."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often and how fast a dead service is started again.

    Attributes:
        first_pause_s: Pause before the first restart.
        max_pause_s: Longest pause; each is twice the one before.
        stable_s: A service that ran this long starts from the first pause again.
        max_start_attempts: Attempts to reach readiness the first time.
        start_timeout_s: Seconds within which a started service must be ready.
        progress_interval_s: Seconds between two lines about a service that is still starting.
    """

    first_pause_s: float = 0.5
    max_pause_s: float = 30.0
    stable_s: float = 60.0
    max_start_attempts: int = 3
    start_timeout_s: float = 600.0
    progress_interval_s: float = 10.0


class Supervisor:
    """Runs the services of one stack until it is told to stop."""

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        console: Console,
        on_output: Callable[[str, str], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        """Build the supervisor; nothing is started before ``run``.

        Args:
            specs: Services, each after those it depends on.
            console: Shows states and logs.
            on_output: Gets the name of a service and every line that it writes.
            policy: Restarts and deadlines.
        """
        self._services = {
            spec.name: _Service(spec, console, on_output, policy or RestartPolicy())
            for spec in specs
        }
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()

    @property
    def pids(self) -> Mapping[str, int]:
        """Process ids of the services that run now."""
        found = {name: service.pid for name, service in self._services.items()}
        return {name: pid for name, pid in found.items() if pid is not None}

    def request_stop(self) -> None:
        """Stop the stack; a second request kills what is still there."""
        if self._stopping.is_set():
            self._killing.set()
        self._stopping.set()

    async def run(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        """Start everything, call ``on_ready`` once all is ready, return when all has stopped.

        Raises:
            StartError: A service could not be brought up.
        """
        keepers = [
            asyncio.create_task(service.keep_running(self._services), name=f"keep {name}")
            for name, service in self._services.items()
        ]
        announcer = asyncio.create_task(self._announce(on_ready), name="announce")
        stopper = asyncio.create_task(self._stopping.wait(), name="await stop")
        try:
            await asyncio.wait([*keepers, stopper], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            announcer.cancel()
            await self._stop_all()
            for task in (*keepers, stopper):
                task.cancel()
            results = await asyncio.gather(*keepers, announcer, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _announce(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        for service in self._services.values():
            await service.was_ready.wait()
        await on_ready()

    async def _stop_all(self) -> None:
        """Stop every service after those that depend on it."""
        killer = asyncio.create_task(self._kill_on_request(), name="kill on request")
        waiting = dict(self._services)
        while waiting:
            needed = {name for s in waiting.values() for name in s.spec.depends_on}
            free = [name for name in waiting if name not in needed]
            assert free, "services must not depend on each other in a circle"
            await asyncio.gather(*(waiting.pop(name).stop() for name in free))
        killer.cancel()

    async def _kill_on_request(self) -> None:
        await self._killing.wait()
        await asyncio.gather(*(service.kill() for service in self._services.values()))


class _Service:
    """One service of the stack and the process that runs it now."""

    def __init__(
        self,
        spec: ServiceSpec,
        console: Console,
        on_output: Callable[[str, str], None],
        policy: RestartPolicy,
    ) -> None:
        self.spec = spec
        self.was_ready = asyncio.Event()
        self._console = console
        self._on_output = on_output
        self._policy = policy
        self._child: Child | None = None
        self._is_stopping = False
        self._percent = 0
        self._hidden: deque[LogLine] = deque(maxlen=_NUM_LAST_LINES)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child and self._child.returncode is None else None

    async def keep_running(self, services: Mapping[str, _Service]) -> None:
        """Start the process when its dependencies are ready, and again whenever it ends."""
        for name in self.spec.depends_on:
            await services[name].was_ready.wait()
        num_attempts, pause_s = 0, self._policy.first_pause_s
        while not self._is_stopping:
            num_attempts += 1
            started_at = time.monotonic()
            problem = await self._run_once()
            if self._is_stopping:
                return
            self._show_last_lines()
            if not self.was_ready.is_set():
                self._check_attempts(num_attempts, problem)
            if time.monotonic() - started_at > self._policy.stable_s:
                pause_s = self._policy.first_pause_s
            self._show(f"{problem}, starting again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._policy.max_pause_s)

    async def stop(self) -> None:
        """Stop the process for good."""
        self._is_stopping = True
        if self._child is None:
            return
        if self._child.returncode is None:
            started_at = time.monotonic()
            await self._child.stop(self.spec.drain_s)
            self._show("stopped", time.monotonic() - started_at)
        else:
            await self._child.kill()

    async def kill(self) -> None:
        """Kill the process for good, without waiting for its work."""
        self._is_stopping = True
        if self._child is not None:
            await self._child.kill()

    async def _run_once(self) -> str:
        """Run the process until it ends; return what happened to it."""
        started_at = time.monotonic()
        self._percent = 0
        self._child = None
        try:
            self._child = child = await Child.start(self.spec, self._take_line)
        except OSError as error:
            return f"no process could be started: {error.strerror or error}"
        if self._is_stopping:
            await child.kill()
            return "stopped"
        self._show("starting")
        ended = asyncio.create_task(child.wait(), name=f"wait {self.spec.name}")
        try:
            if not await self._wait_ready(ended, started_at):
                if ended.done():
                    return _exit_text(ended.result())
                await child.kill()
                return f"not ready within {self._policy.start_timeout_s:g} s"
            self._show("ready", time.monotonic() - started_at)
            self.was_ready.set()
            return _exit_text(await ended)
        finally:
            ended.cancel()
            if child.returncode is not None:
                await child.kill()

    async def _wait_ready(self, ended: asyncio.Task[int], started_at: float) -> bool:
        """Return whether the process became ready before it ended or the time was up."""
        ready = asyncio.ensure_future(self.spec.wait_ready())
        deadline = started_at + self._policy.start_timeout_s
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                pause_s = min(left_s, self._policy.progress_interval_s)
                await asyncio.wait(
                    (ready, ended), timeout=pause_s, return_when=asyncio.FIRST_COMPLETED
                )
                if ended.done():
                    return False
                if ready.done():
                    ready.result()
                    return True
                self._show("loading", time.monotonic() - started_at)
            return False
        finally:
            ready.cancel()
            await asyncio.wait([ready])

    def _check_attempts(self, num_attempts: int, problem: str) -> None:
        status = self._child.returncode if self._child else None
        is_hopeless = status == _CONFIG_ERROR_STATUS
        if is_hopeless or num_attempts >= self._policy.max_start_attempts:
            self._show(problem)
            raise StartError(f"{self.spec.name} could not be started: {problem}.")

    def _take_line(self, text: str) -> None:
        line = LogLine.parse(text)
        with contextlib.suppress(OSError, ValueError):
            self._on_output(self.spec.name, text)
        percent = line.progress_percent
        if percent is not None:
            self._show_progress(percent)
        elif not self._console.log(self.spec.name, line):
            self._hidden.append(line)

    def _show_progress(self, percent: int) -> None:
        if percent >= self._percent + 10:
            self._percent = percent
            self._show(f"loading {percent} %")

    def _show_last_lines(self) -> None:
        """Show what the process wrote last, for whoever has to find out why it ended."""
        while self._hidden:
            self._console.show_log(self.spec.name, self._hidden.popleft())

    def _show(self, state: str, seconds: float | None = None) -> None:
        self._console.state(self.spec.name, self.spec.address, state, seconds)


def _exit_text(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
