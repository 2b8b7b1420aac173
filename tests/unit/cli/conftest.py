"""Small programs that stand in for services, and a console that can be read."""

from __future__ import annotations

import asyncio
import io
import sys
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from chiasm.cli.child import ServiceSpec
from chiasm.cli.console import Console
from chiasm.cli.supervisor import RestartPolicy, Supervisor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FAST_POLICY = RestartPolicy(
    first_pause_s=0.01, max_pause_s=0.02, start_timeout_s=10.0, progress_interval_s=5.0
)


@dataclass
class Output:
    """What a supervisor and its children wrote, with a way to wait for a line."""

    states: io.StringIO = field(default_factory=io.StringIO)
    logs: io.StringIO = field(default_factory=io.StringIO)
    lines: list[tuple[str, str]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, name: str, text: str) -> None:
        """Remember a line of a child."""
        self.lines.append((name, text))
        self.changed.set()

    async def wait_for_line(self, name: str, text: str, count: int = 1) -> None:
        """Return once the child has written the line ``count`` times."""
        async with asyncio.timeout(20):
            while self.lines.count((name, text)) < count:
                self.changed.clear()
                await self.changed.wait()


class Stack:
    """Builds specs of fake services and a supervisor over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = Output()
        self.ready = asyncio.Event()

    def spec(
        self,
        name: str,
        program: str,
        depends_on: tuple[str, ...] = (),
        drain_s: float = 5.0,
    ) -> ServiceSpec:
        """Return a service that runs ``program`` and is ready once it has written "up"."""
        path = self.folder / f"{name}.py"
        path.write_text("import signal, sys, time, os\n" + textwrap.dedent(program))
        seen = 0

        async def wait_ready() -> None:
            nonlocal seen
            seen += 1
            await self.output.wait_for_line(name, "up", seen)

        return ServiceSpec(
            name=name,
            command=(sys.executable, "-u", "-I", "-S", str(path)),
            address=f"fake:{name}",
            wait_ready=wait_ready,
            depends_on=depends_on,
            drain_s=drain_s,
        )

    def supervisor(
        self, specs: Sequence[ServiceSpec], policy: RestartPolicy = FAST_POLICY
    ) -> Supervisor:
        """Return a supervisor that writes into ``output``."""
        console = Console(self.output.states, self.output.logs, "warning")
        return Supervisor(specs, console, self.output.take, policy)

    async def on_ready(self) -> None:
        """Remember that the stack is ready."""
        self.ready.set()

    def state_lines(self) -> list[str]:
        """Return the lines about states."""
        return self.output.states.getvalue().splitlines()


@pytest.fixture
async def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)
