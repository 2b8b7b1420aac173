"""``/v1/media``: media items as things of their own."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import orjson
import structlog
from starlette.responses import Response

from chiasm.common.errors import ChiasmError, InvalidRequestError
from chiasm.v1 import chat_pb2

from ..chat_request import Caller
from ..convert_media_objects import name_from_proto, page_from_proto
from .disconnect import run_until_disconnect
from .errors import JSON_TYPE, error_response, internal_error
from .media_json import (
    MODALITIES,
    MediaBody,
    estimate_to_json,
    object_to_json,
    page_to_json,
    parse_estimate,
    parse_put,
    put_to_json,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from chiasm.common.limits import Limits

    from ..auth import ApiKeys
    from ..media_library import MediaLibrary
    from ..media_object import MediaName, MediaRequest
    from ..media_policy import MediaPolicy
    from .body import BodyReader

    Parse = Callable[[MediaBody, Limits, MediaPolicy], MediaRequest]

_MAX_BYTES_ON_LOOP = 100_000

log = structlog.get_logger(__name__)


class MediaEndpoint:
    """The media routes with what they need."""

    def __init__(
        self,
        library: MediaLibrary,
        keys: ApiKeys,
        bodies: BodyReader,
        limits: Limits,
        request_timeout_s: float,
    ) -> None:
        self._library = library
        self._keys = keys
        self._bodies = bodies
        self._limits = limits
        self._request_timeout_s = request_timeout_s

    async def put_media(self, request: Request) -> Response:
        """Encode a media item now and keep it.

        Raises:
            ChiasmError: The request is refused before any work; later errors are answered by the
                response itself.
        """
        caller = self._caller(request)
        parsed = await self._parse(request, parse_put)

        async def work() -> bytes:
            return put_to_json(await self._library.put(parsed, caller))

        return WorkAnswer(work)

    async def estimate_media(self, request: Request) -> Response:
        """Tell what a media item would cost.

        Raises:
            ChiasmError: As ``put_media``.
        """
        caller = self._caller(request)
        parsed = await self._parse(request, parse_estimate)

        async def work() -> bytes:
            return estimate_to_json(await self._library.estimate(parsed, caller))

        return WorkAnswer(work)

    async def get_media(self, request: Request) -> Response:
        """Describe a media item."""
        caller = self._caller(request)
        media = await self._library.get(_name(request), caller.tenant)
        return Response(object_to_json(media), media_type=JSON_TYPE)

    async def delete_media(self, request: Request) -> Response:
        """Forget a media item."""
        caller = self._caller(request)
        name = _name(request)
        await self._library.delete(name, caller.tenant)
        body = {"uuid": name.uuid, "object": "media", "deleted": True}
        return Response(orjson.dumps(body), media_type=JSON_TYPE)

    async def list_media(self, request: Request) -> Response:
        """List media items, a page at a time."""
        caller = self._caller(request)
        query = request.query_params
        message = chat_pb2.ListMediaRequest(
            limit=_limit(query.get("limit"), self._limits.max_page_items),
            after=query.get("after", ""),
            cache_salt=query.get("cache_salt", ""),
        )
        page = await self._library.page(caller.tenant, page_from_proto(message, self._limits))
        return Response(page_to_json(page), media_type=JSON_TYPE)

    async def forget_media(self, request: Request) -> Response:
        """Forget everything of the caller's tenant, if the query says ``all=true``."""
        caller = self._caller(request)
        # What narrows other calls must not be taken for a part of everything.
        if others := sorted(set(request.query_params) - {"all"}):
            raise InvalidRequestError(
                f"Everything of the tenant is forgotten, whatever its {others[0]}; leave it out.",
                param=others[0],
            )
        if request.query_params.get("all") != "true":
            raise InvalidRequestError(
                "To forget every media item, say so with ?all=true; to forget one, name it.",
                param="all",
            )
        num_forgotten = await self._library.forget(caller)
        body = {"object": "list", "deleted": True, "count": num_forgotten}
        return Response(orjson.dumps(body), media_type=JSON_TYPE)

    def _caller(self, request: Request) -> Caller:
        tenant = self._keys.authenticate(request.headers.get("authorization"))
        return Caller(tenant, self._request_timeout_s)

    async def _parse(self, request: Request, parse: Parse) -> MediaRequest:
        request_id: str = request.state.request_id
        content_type = request.headers.get("content-type", "")
        async with self._bodies.read(request, takes_forms=True) as body:
            media = MediaBody(body, content_type, request_id)
            policy = self._library.policy
            if len(body) <= _MAX_BYTES_ON_LOOP:
                return parse(media, self._limits, policy)
            return await asyncio.to_thread(parse, media, self._limits, policy)


class WorkAnswer(Response):
    """Does the work of a request and sends its JSON; stops if the client goes away."""

    def __init__(self, work: Callable[[], Awaitable[bytes]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do the work and send what came of it."""
        await run_until_disconnect(receive, send, partial(self._answer, scope, receive))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = Response(await self._work(), 200, media_type=JSON_TYPE)
        except ChiasmError as error:
            response = error_response(error)
        except Exception:
            log.exception("request_crashed")
            response = error_response(internal_error())
        await response(scope, receive, send)


def _name(request: Request) -> MediaName:
    query = request.query_params
    modality = query.get("modality")
    if modality is not None and modality not in MODALITIES:
        raise InvalidRequestError(
            f"modality must be one of {', '.join(MODALITIES)}.", param="modality"
        )
    message = chat_pb2.GetMediaRequest(
        uuid=request.path_params["uuid"], cache_salt=query.get("cache_salt", "")
    )
    if modality is not None:
        message.modality = MODALITIES[modality]
    return name_from_proto(message)


def _limit(text: str | None, max_items: int) -> int:
    """Return the size of a page; 0 if the client did not say."""
    if text is None:
        return 0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= max_items:
        raise InvalidRequestError(f"limit must be between 1 and {max_items}.", param="limit")
    return int(text[:9])
