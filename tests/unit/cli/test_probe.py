"""The probe that healthchecks run."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from chiasm.cli.probe import probe_grpc, probe_http, run_probe
from tests.fakes.echo_server import SERVICE, EchoServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def server() -> AsyncIterator[EchoServer]:
    server = EchoServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("service", ["", SERVICE, "liveness"])
async def test_serving_service_is_healthy(server: EchoServer, service: str) -> None:
    assert await probe_grpc(server.address, service, 5.0) is None


async def test_service_that_does_not_serve_is_told(server: EchoServer) -> None:
    await server.grpc_server.set_serving(False)

    assert await probe_grpc(server.address, "", 5.0) == f"{server.address} is NOT_SERVING."


async def test_unknown_service_is_told(server: EchoServer) -> None:
    assert await probe_grpc(server.address, "x.Y", 5.0) == f"{server.address} answers NOT_FOUND."


def test_grpc_port_that_nobody_listens_on_is_told(closed_port: int) -> None:
    problem = run_probe(f"grpc://127.0.0.1:{closed_port}", 5.0)

    assert problem == f"127.0.0.1:{closed_port} answers UNAVAILABLE."


@pytest.mark.parametrize(
    ("status", "problem"), [("200 OK", None), ("503 Busy", "/ready answers 503.")]
)
async def test_http_service_is_healthy_if_it_answers_2xx(status: str, problem: str | None) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as http:
        address = "{}:{}".format(*http.sockets[0].getsockname())
        found = await asyncio.to_thread(probe_http, address, "/ready", 5.0)

    assert found == (problem and f"{address}{problem}")


def test_http_port_that_nobody_listens_on_is_told(closed_port: int) -> None:
    problem = run_probe(f"http://127.0.0.1:{closed_port}/ready", 5.0)

    assert problem is not None
    assert "does not answer" in problem


@pytest.mark.parametrize("target", ["", "127.0.0.1:80", "grpc://", "ftp://x", "http://"])
def test_target_of_another_form_is_refused(target: str) -> None:
    problem = run_probe(target, 5.0)

    assert problem is not None
    assert "neither grpc://" in problem


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:abc/", "http://[::1/", "http://127.0.0.1:65536", "grpc://h:abc"]
)
def test_address_that_cannot_be_is_told(target: str) -> None:
    problem = run_probe(target, 5.0)

    assert problem is not None
    assert problem.startswith(f"{target} is no address: ")


def test_path_that_cannot_be_sent_is_told(closed_port: int) -> None:
    problem = run_probe(f"http://127.0.0.1:{closed_port}/é", 5.0)

    assert problem is not None
    assert "does not answer" in problem
