"""``/health``, ``/ready``, ``/version`` and ``/metrics``: for machines that look after us."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from .errors import JSON_TYPE

if TYPE_CHECKING:
    from starlette.requests import Request

    from ..stack_info import StackInfo


class HealthEndpoint:
    """The routes that need no key."""

    def __init__(self, stack: StackInfo) -> None:
        self._stack = stack

    async def health(self, request: Request) -> Response:
        """Answer 200 for as long as the process is alive."""
        del request
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answer 200 when the first answer can be given, else 503 with what is missing."""
        del request
        missing = self._stack.missing()
        if missing:
            return _json({"status": "starting", "missing": missing}, 503)
        return _json({"status": "ready"})

    async def version(self, request: Request) -> Response:
        """Tell the version of the server."""
        del request
        return _json({"version": metadata.version("chiasm")})

    async def metrics(self, request: Request) -> Response:
        """Expose all metrics in the text format of Prometheus."""
        del request
        return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})


def _json(document: dict[str, object], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type=JSON_TYPE)
