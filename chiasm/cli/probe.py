"""Ask one service whether it is healthy, as container healthchecks and the supervisor do."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import urllib.parse


def run_probe(target: str, timeout_s: float) -> str | None:
    """Return ``None`` if ``target`` is healthy, else a sentence that says what is wrong.

    Args:
        target: ``grpc://host:port[/service]`` or ``http://host:port/path``.
        timeout_s: Seconds to wait for the answer.
    """
    try:
        parts = urllib.parse.urlsplit(target)
        # Only whoever asks for the port is told that it is none.
        _ = parts.port
    except ValueError as error:
        return f"{target} is no address: {error}."
    if parts.scheme == "grpc" and parts.netloc:
        return asyncio.run(probe_grpc(parts.netloc, parts.path.lstrip("/"), timeout_s))
    if parts.scheme == "http" and parts.netloc:
        return probe_http(parts.netloc, parts.path or "/", timeout_s)
    return f"{target} is neither grpc://host:port nor http://host:port/path."


async def probe_grpc(address: str, service: str, timeout_s: float) -> str | None:
    """Return ``None`` if the health service at ``address`` says SERVING, else what it says."""
    import grpc  # noqa: PLC0415 - probing HTTP needs no gRPC
    from grpc_health.v1 import health_pb2  # noqa: PLC0415

    async with grpc.aio.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return f"{address} answers {error.code().name}."
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if status == "SERVING" else f"{address} is {status}."


def probe_http(address: str, path: str, timeout_s: float) -> str | None:
    """Return ``None`` if a GET answers 2xx, else a sentence with the status or the failure."""
    try:
        with contextlib.closing(http.client.HTTPConnection(address, timeout=timeout_s)) as server:
            server.request("GET", path)
            status = server.getresponse().status
    # A ValueError: a name or path that cannot be sent.
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{address} does not answer: {error}."
    return None if 200 <= status < 300 else f"{address}{path} answers {status}."
