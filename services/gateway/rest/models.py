"""``GET /v1/models``: what is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from starlette.responses import Response

from chiasm.common.errors import NotFoundError

from .errors import JSON_TYPE

if TYPE_CHECKING:
    from starlette.requests import Request

    from ..auth import ApiKeys
    from ..chat_service import ChatPipeline
    from ..served_model import ModelCard


class ModelsEndpoint:
    """The model routes."""

    def __init__(self, pipeline: ChatPipeline, keys: ApiKeys) -> None:
        self._pipeline = pipeline
        self._keys = keys

    async def list_models(self, request: Request) -> Response:
        """List the served models."""
        self._keys.authenticate(request.headers.get("authorization"))
        card = _card_to_json(self._pipeline.model_card())
        return Response(orjson.dumps({"object": "list", "data": [card]}), media_type=JSON_TYPE)

    async def get_model(self, request: Request) -> Response:
        """Describe one model.

        Raises:
            NotFoundError: It is not served.
        """
        self._keys.authenticate(request.headers.get("authorization"))
        name = request.path_params["name"]
        card = self._pipeline.model_card()
        if name != card.name:
            raise NotFoundError(
                f"The model `{name}` does not exist.", reason="MODEL_NOT_FOUND", param="model"
            )
        return Response(orjson.dumps(_card_to_json(card)), media_type=JSON_TYPE)


def _card_to_json(card: ModelCard) -> dict[str, object]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_s,
        "owned_by": "chiasm",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
        "modalities": ["text", *(modality.value for modality in card.modalities)],
    }
