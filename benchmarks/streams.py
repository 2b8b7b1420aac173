"""Tokens per second through gateway and generator, with a model that costs nothing.

Keeps many streams alive, over the gateway's REST API and over a bare session, and prints a
markdown table: tokens per second and CPU time per token of each process, medians of the rounds
with the smallest and largest. Tokens that a reader has not taken are merged, so tokens per message
say whether the reader keeps up with the steps::

    python -m benchmarks.streams --model models/demo --streams 256 --step-s 0.01
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import orjson
import uvloop

from chiasm.common.grpc_client import EndpointPool
from chiasm.common.media import RequestContext
from chiasm.common.sampling import SamplingWishes
from chiasm.common.secrets import StoreSecrets
from chiasm.gateway.budgets import RetryBudget
from chiasm.gateway.deadline import Deadline
from chiasm.gateway.generator_client import GenerateStart, GeneratorClient, TokensAdded
from chiasm.gateway.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

# A character that stands nowhere in a chunk but in the text of the token.
MARK = "#"
MAX_TOKENS = 1_000_000
START_TIMEOUT_S = 60.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Counter:
    """What all streams have received."""

    num_tokens: int = 0
    num_messages: int = 0
    num_live: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Round:
    """One round: tokens per second, tokens per message, CPU microseconds per token by process."""

    tokens_per_s: float
    tokens_per_message: float
    cpu_us: dict[str, float]


class SseStream(asyncio.Protocol):
    """One streamed chat completion; counts marks in raw bytes, which costs the client little."""

    def __init__(self, request: bytes, counter: Counter) -> None:
        self._request = request
        self._counter = counter
        self._is_live = False
        self.transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self.transport = transport
        # NOTE: uvloop's transports have the methods of asyncio's, not their classes.
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count what came."""
        num_tokens = data.count(MARK.encode())
        if not self._is_live:
            if data.startswith(b"HTTP/1.1 ") and b" 200 " not in data[:20]:
                self._counter.errors.append(data[:300].decode())
            self._is_live = num_tokens > 0
            self._counter.num_live += self._is_live
        self._counter.num_tokens += num_tokens
        self._counter.num_messages += data.count(b'"content":"' + MARK.encode())


async def measure(
    counter: Counter, pids: dict[str, int], arguments: argparse.Namespace
) -> list[Round]:
    """Wait until all streams are live, then count for some rounds."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while counter.num_live < arguments.streams:
            assert not counter.errors, counter.errors[0]
            await asyncio.sleep(0.05)
    rounds = []
    for _ in range(arguments.rounds):
        cpu_s = {name: _cpu_s(pid) for name, pid in pids.items()}
        tokens, messages, start_s = counter.num_tokens, counter.num_messages, time.perf_counter()
        await asyncio.sleep(arguments.round_s)
        wall_s = time.perf_counter() - start_s
        tokens, messages = counter.num_tokens - tokens, counter.num_messages - messages
        cpu_us = {name: (_cpu_s(pid) - cpu_s[name]) / tokens * 1e6 for name, pid in pids.items()}
        rounds.append(Round(tokens / wall_s, tokens / messages, cpu_us))
    return rounds


async def measure_session(
    address: str, token: str, pids: dict[str, int], arguments: argparse.Namespace
) -> list[Round]:
    """Read all streams over one session in this process."""
    pool = EndpointPool(address, token, peer="generator")
    client = GeneratorClient(pool, RetryBudget())
    await client.start()
    await pool.wait_until_serving(START_TIMEOUT_S)
    counter = Counter()
    start = GenerateStart(
        context=RequestContext("request", "attempt", "tenant"),
        token_ids=[1, 2, 3],
        spans=(),
        sampling=SamplingWishes(max_tokens=MAX_TOKENS, ignore_eos=True),
    )

    async def stream() -> None:
        async with client.generate(start, Deadline.after(3600.0)) as call:
            counter.num_live += 1
            async for event in call:
                if isinstance(event, TokensAdded):
                    counter.num_tokens += len(event.token_ids)
                    counter.num_messages += 1

    tasks = [asyncio.create_task(stream()) for _ in range(arguments.streams)]
    rounds = await measure(counter, pids, arguments)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()
    return rounds


async def measure_rest(
    port: int, pids: dict[str, int], arguments: argparse.Namespace
) -> list[Round]:
    """Read all streams as server-sent events of the gateway."""
    counter = Counter()
    body = orjson.dumps(
        {
            "messages": [{"role": "user", "content": "Go on."}],
            "stream": True,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
        }
    )
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    ) + body
    loop = asyncio.get_running_loop()
    streams = []
    for _ in range(arguments.streams):
        _, stream = await loop.create_connection(
            lambda: SseStream(request, counter), "127.0.0.1", port
        )
        streams.append(stream)
    rounds = await measure(counter, pids, arguments)
    for stream in streams:
        if stream.transport is not None:
            stream.transport.close()
    return rounds


def main() -> None:
    """Run both ways and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--step-s", type=float, default=0.01, help="seconds of one engine step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-s", type=float, default=4.0)
    arguments = parser.parse_args()
    with _generator(arguments) as (generator, address, token):
        pids = {"generator": generator.pid, "client": os.getpid()}
        rounds = uvloop.run(measure_session(address, token, pids, arguments))
    _print_row("session", rounds, is_first=True)
    with (
        _generator(arguments) as (generator, address, token),
        _gateway(arguments.model, address, token) as (gateway, port),
    ):
        pids = {"generator": generator.pid, "gateway": gateway.pid, "client": os.getpid()}
        rounds = uvloop.run(measure_rest(port, pids, arguments))
    _print_row("REST", rounds)


@contextmanager
def _generator(
    arguments: argparse.Namespace,
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    tokenizer = Tokenizer.load(arguments.model)
    (token_id,) = tokenizer.encode(MARK)
    token = secrets.token_hex(32)
    flags = {
        "--model-name": arguments.model.name,
        "--token": token,
        "--token-id": str(token_id),
        "--step-s": str(arguments.step_s),
    }
    command = [sys.executable, "-m", "benchmarks.free_generator"]
    with _running([*command, *(part for flag in flags.items() for part in flag)]) as process:
        assert process.stdout is not None, "it was asked for"
        yield process, f"127.0.0.1:{int(process.stdout.readline())}", token


@contextmanager
def _gateway(
    model: Path, generators: str, token: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with tempfile.TemporaryDirectory() as folder:
        token_file, secret_file = Path(folder) / "token", Path(folder) / "secret"
        token_file.touch(0o600)
        token_file.write_text(token + "\n", encoding="utf-8")
        StoreSecrets.load_or_create(secret_file)
        flags = {
            "--model": str(model),
            "--listen": "127.0.0.1:0",
            "--grpc-listen": "127.0.0.1:0",
            "--generators": generators,
            "--service-token-file": str(token_file),
            "--store-secret-file": str(secret_file),
            "--drain-s": "0",
        }
        command = [sys.executable, "-m", "chiasm.gateway"]
        command += [part for flag in flags.items() for part in flag]
        with _running(command, is_logged=True) as process:
            port = _read_port(process)
            _wait_for_generator(port)
            yield process, port


@contextmanager
def _running(command: list[str], *, is_logged: bool = False) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if is_logged else None,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _read_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None, "it was asked for"
    for text in process.stdout:
        line = orjson.loads(text)
        if line["event"] == "gateway_listening":
            return int(line["port"])
    raise RuntimeError("The gateway ended.")


def _wait_for_generator(port: int) -> None:
    """Return when only the encoder is missing, which text needs not."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
        connection.request("GET", "/ready")
        missing = orjson.loads(connection.getresponse().read()).get("missing")
        connection.close()
        if missing == ["encoder"]:
            return
        time.sleep(0.05)
    raise TimeoutError("The gateway did not find the generator.")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def _print_row(name: str, rounds: list[Round], *, is_first: bool = False) -> None:
    if is_first:
        sys.stdout.write(
            "| over | tokens/s | tokens/message | CPU us/token: generator | gateway | client |\n"
            "|---|---|---|---|---|---|\n"
        )
    cells = [
        _spread([r.tokens_per_s for r in rounds], ".0f"),
        _spread([r.tokens_per_message for r in rounds], ".2f"),
        *(
            _spread([r.cpu_us[process] for r in rounds], ".1f")
            if process in rounds[0].cpu_us
            else "-"
            for process in ("generator", "gateway", "client")
        ),
    ]
    sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    sys.stdout.flush()


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


if __name__ == "__main__":
    main()
