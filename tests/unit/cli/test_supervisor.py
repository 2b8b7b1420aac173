"""The supervisor, run over small programs that behave well or badly."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chiasm.cli.child import Child
from chiasm.cli.console import Console
from chiasm.cli.supervisor import RestartPolicy, StartError, Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from chiasm.cli.child import ServiceSpec
    from tests.unit.cli.conftest import Stack

OBEYS = """
def end(*_):
    print("down"); sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up")
while True:
    signal.pause()
"""
IGNORES_SIGTERM = """
signal.signal(signal.SIGTERM, lambda *_: print("asked"))
print("up")
while True:
    signal.pause()
"""
HAS_CHILD = """
import subprocess
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])
print("child", child.pid)
print("up")
while True:
    signal.pause()
"""


@contextlib.asynccontextmanager
async def running(stack: Stack, supervisor: Supervisor) -> AsyncIterator[None]:
    """Run the supervisor until ready; stop it at the end."""
    task = asyncio.create_task(supervisor.run(stack.on_ready))
    waiter = asyncio.create_task(stack.ready.wait())
    async with asyncio.timeout(20):
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    try:
        yield
    finally:
        supervisor.request_stop()
        async with asyncio.timeout(20):
            await task


async def wait_until_ended(pid: int) -> None:
    """Return when the process has ended; it need not be a child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(10):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_services_start_after_their_dependencies_and_stop_before_them(stack: Stack) -> None:
    specs = [
        stack.spec("store", OBEYS),
        stack.spec("worker", OBEYS, depends_on=("store",)),
        stack.spec("front", OBEYS, depends_on=("store", "worker")),
    ]

    async with running(stack, stack.supervisor(specs)):
        pass

    assert stack.output.lines == [
        ("store", "up"),
        ("worker", "up"),
        ("front", "up"),
        ("front", "down"),
        ("worker", "down"),
        ("store", "down"),
    ]


async def test_every_state_of_a_service_is_one_line_with_name_and_address(stack: Stack) -> None:
    async with running(stack, stack.supervisor([stack.spec("store", OBEYS)])):
        pass

    words = [line.split() for line in stack.state_lines()]
    assert [line[:3] for line in words] == [
        ["store", "fake:store", "starting"],
        ["store", "fake:store", "ready"],
        ["store", "fake:store", "stopped"],
    ]
    assert float(words[1][3]) >= 0


async def test_killed_service_is_started_again(stack: Stack) -> None:
    supervisor = stack.supervisor([stack.spec("store", OBEYS)])

    async with running(stack, supervisor):
        first = supervisor.pids["store"]
        os.kill(first, signal.SIGKILL)
        await stack.output.wait_for_line("store", "up", 2)
        second = supervisor.pids["store"]

    assert first != second
    assert any("killed by signal 9, starting again" in line for line in stack.state_lines())


async def test_service_that_keeps_dying_after_it_was_ready_is_never_given_up(stack: Stack) -> None:
    marker = stack.folder / "ran"
    program = f"""
    print("up")
    if os.path.exists({str(marker)!r}):
        sys.exit(3)
    open({str(marker)!r}, "w").close()
    """

    async with running(stack, stack.supervisor([stack.spec("store", program)])):
        await stack.output.wait_for_line("store", "up", 6)

    assert sum("ended with status 3" in line for line in stack.state_lines()) >= 4


async def test_pauses_between_restarts_grow_up_to_the_longest(stack: Stack) -> None:
    policy = RestartPolicy(first_pause_s=0.01, max_pause_s=0.04)
    spec = stack.spec("store", "print('up'); sys.exit(3)")

    async with running(stack, stack.supervisor([spec], policy)):
        await stack.output.wait_for_line("store", "up", 5)

    pauses = [line.split()[-2] for line in stack.state_lines() if "again" in line]
    assert pauses[:4] == ["0.01", "0.02", "0.04", "0.04"]


async def test_wrong_configuration_stops_the_start_at_once(stack: Stack) -> None:
    specs = [stack.spec("store", OBEYS), stack.spec("worker", "sys.exit(2)", ("store",))]

    with pytest.raises(StartError, match="worker could not be started: ended with status 2"):
        await stack.supervisor(specs).run(stack.on_ready)

    assert ("store", "down") in stack.output.lines
    assert sum("worker" in line and "starting" in line for line in stack.state_lines()) == 1


async def test_service_that_never_comes_up_stops_the_start_after_a_few_attempts(
    stack: Stack,
) -> None:
    with pytest.raises(StartError, match="ended with status 7"):
        await stack.supervisor([stack.spec("store", "sys.exit(7)")]).run(stack.on_ready)

    assert sum(line.endswith(" starting") for line in stack.state_lines()) == 3


async def test_service_that_is_not_ready_in_time_is_killed(stack: Stack) -> None:
    policy = RestartPolicy(max_start_attempts=1, start_timeout_s=0.2, progress_interval_s=0.05)

    with pytest.raises(StartError, match=r"not ready within 0\.2 s"):
        await stack.supervisor([stack.spec("slow", "signal.pause()")], policy).run(stack.on_ready)

    assert any(" loading  " in line for line in stack.state_lines())


async def test_service_that_ignores_the_stop_is_killed_after_its_grace(stack: Stack) -> None:
    supervisor = stack.supervisor([stack.spec("store", IGNORES_SIGTERM, drain_s=0.2)])

    async with running(stack, supervisor):
        pid = supervisor.pids["store"]

    assert ("store", "asked") in stack.output.lines
    assert not is_running(pid)


async def test_second_stop_request_kills_without_waiting_for_the_grace(stack: Stack) -> None:
    supervisor = stack.supervisor([stack.spec("store", IGNORES_SIGTERM, drain_s=60.0)])
    task = asyncio.create_task(supervisor.run(stack.on_ready))
    await stack.ready.wait()

    supervisor.request_stop()
    await stack.output.wait_for_line("store", "asked")
    supervisor.request_stop()

    async with asyncio.timeout(5):
        await task
    assert supervisor.pids == {}


async def test_processes_started_by_a_service_are_killed_with_it(stack: Stack) -> None:
    async with running(stack, stack.supervisor([stack.spec("store", HAS_CHILD)])):
        child = next(int(text.split()[1]) for _, text in stack.output.lines if "child" in text)
        assert is_running(child)

    await wait_until_ended(child)


async def test_progress_that_a_service_reports_is_shown_in_steps_of_ten(stack: Stack) -> None:
    program = """
    for percent in (5, 10, 12, 55, 100):
        print('{"event": "load_progress", "level": "info", "percent": %d}' % percent)
    print("up")
    signal.pause()
    """

    async with running(stack, stack.supervisor([stack.spec("store", program)])):
        pass

    shown = [line.split("loading ")[1] for line in stack.state_lines() if "loading" in line]
    assert shown == ["10 %", "55 %", "100 %"]


async def test_children_end_when_the_supervisor_is_killed(stack: Stack, tmp_path: Path) -> None:
    spec = stack.spec("store", OBEYS)
    program = tmp_path / "supervise.py"
    program.write_text(
        "import asyncio, sys\n"
        "from chiasm.cli.child import Child, ServiceSpec\n"
        "async def main():\n"
        f"    spec = ServiceSpec('store', {spec.command!r}, '', None)\n"
        "    child = await Child.start(spec, lambda line: print(child.pid, flush=True))\n"
        "    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    pid = int(await asyncio.wait_for(process.stdout.readline(), 20))
    assert is_running(pid)

    process.kill()
    await process.wait()

    await wait_until_ended(pid)


async def test_lines_that_cannot_be_kept_do_not_disturb_the_service(stack: Stack) -> None:
    def take(name: str, text: str) -> None:
        stack.output.take(name, text)
        raise OSError(28, "No space left on device")

    spec = stack.spec("store", OBEYS)
    supervisor = Supervisor([spec], Console(io.StringIO(), io.StringIO(), "debug"), take)

    async with running(stack, supervisor):
        assert len(supervisor.pids) == 1

    assert stack.output.lines == [("store", "up"), ("store", "down")]


async def test_reader_survives_whatever_becomes_of_its_lines(stack: Stack) -> None:
    seen: list[str] = []

    def refuse(text: str) -> None:
        seen.append(text)
        raise ValueError("I/O operation on closed file")

    child = await Child.start(stack.spec("talker", "print(1); print(2, end='')"), refuse)

    assert await child.wait() == 0
    await child.kill()
    assert seen == ["1", "2"]


async def test_restart_that_finds_no_process_is_tried_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its first end has status 2, which must not be taken for that of the attempts without process.
    supervisor = stack.supervisor(
        [stack.spec("store", "print('up'); time.sleep(0.2); sys.exit(2)")]
    )
    start, num_starts = Child.start, 0

    async def start_sometimes(spec: ServiceSpec, on_line: Callable[[str], None]) -> Child:
        nonlocal num_starts
        num_starts += 1
        if num_starts in (2, 3):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await start(spec, on_line)

    monkeypatch.setattr(Child, "start", start_sometimes)
    async with running(stack, supervisor):
        await stack.output.wait_for_line("store", "up", 2)

    states = "\n".join(stack.state_lines())
    assert states.count("no process could be started: Resource temporarily unavailable") == 2


async def test_first_start_that_never_finds_a_process_is_given_up(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(spec: ServiceSpec, on_line: Callable[[str], None]) -> Child:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Child, "start", refuse)

    with pytest.raises(StartError, match="no process could be started: Too many open files"):
        await stack.supervisor([stack.spec("store", OBEYS)]).run(stack.on_ready)
