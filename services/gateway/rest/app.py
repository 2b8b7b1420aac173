"""Put the routes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from .errors import answer_http_exception, answers_errors
from .middleware import RequestMiddleware

if TYPE_CHECKING:
    from chiasm.common.limits import Limits

    from .chat import ChatEndpoint
    from .health import HealthEndpoint
    from .media import MediaEndpoint
    from .models import ModelsEndpoint


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The endpoints of the REST API."""

    chat: ChatEndpoint
    models: ModelsEndpoint
    media: MediaEndpoint
    health: HealthEndpoint


def create_app(endpoints: Endpoints, limits: Limits) -> Starlette:
    """Return the REST API as an ASGI application."""
    chat, models, health = endpoints.chat, endpoints.models, endpoints.health
    media = endpoints.media
    routes = [
        Route(
            "/v1/chat/completions", answers_errors(chat.create_chat_completion), methods=["POST"]
        ),
        Route("/v1/models", answers_errors(models.list_models), methods=["GET"]),
        Route("/v1/models/{name:path}", answers_errors(models.get_model), methods=["GET"]),
        Route("/v1/media", answers_errors(media.put_media), methods=["POST"]),
        Route("/v1/media", answers_errors(media.list_media), methods=["GET"]),
        Route("/v1/media", answers_errors(media.forget_media), methods=["DELETE"]),
        Route("/v1/media:estimate", answers_errors(media.estimate_media), methods=["POST"]),
        Route("/v1/media/{uuid:path}", answers_errors(media.get_media), methods=["GET"]),
        Route("/v1/media/{uuid:path}", answers_errors(media.delete_media), methods=["DELETE"]),
        Route("/health", answers_errors(health.health), methods=["GET"]),
        Route("/ready", answers_errors(health.ready), methods=["GET"]),
        Route("/version", answers_errors(health.version), methods=["GET"]),
        Route("/metrics", answers_errors(health.metrics), methods=["GET"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(RequestMiddleware, limits=limits)],
        exception_handlers={HTTPException: answer_http_exception},
    )
