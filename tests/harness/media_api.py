"""A client of ``/v1/media`` and an encoder that keeps what it encodes, for tests of a gateway."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING
from urllib.parse import quote

import aiohttp
from yarl import URL

from chiasm.common.convert import context_from_proto, options_from_proto
from chiasm.common.identity import source_digest
from chiasm.common.media import Embedding, Modality
from chiasm.common.media_resolver import MediaQuery, MediaResolver
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import patient_store
from tests.harness.gateway import Reply

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chiasm.v1 import encoder_pb2
    from tests.harness.gateway import Gateway


class MediaApi:
    """Speaks ``/v1/media`` with a gateway, as one tenant."""

    def __init__(self, gateway: Gateway, key: str = "") -> None:
        self._gateway = gateway
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    async def put(self, data: bytes, **fields: object) -> Reply:
        """Put an image, sent in a data URL."""
        return await self.post("/v1/media", {"url": data_url(data), **fields})

    async def put_form(self, data: bytes, **fields: str) -> Reply:
        """Put an image, sent as a file of a form."""
        form = aiohttp.FormData(fields)
        form.add_field("file", data, filename="a.png", content_type="image/png")
        url = f"{self._gateway.url}/v1/media"
        async with self._gateway.http.post(url, data=form, headers=self._headers) as response:
            return Reply(response.status, response.headers, await response.read())

    async def post(self, path: str, body: Mapping[str, object] | bytes) -> Reply:
        """Post JSON."""
        headers = {"content-type": "application/json", **self._headers}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self._send("POST", path, headers, data)

    async def get(self, uuid: str, query: str = "") -> Reply:
        """Describe an item."""
        return await self._send("GET", f"/v1/media/{quote(uuid, safe='')}{query}", self._headers)

    async def delete(self, uuid: str, query: str = "") -> Reply:
        """Forget an item."""
        return await self._send("DELETE", f"/v1/media/{quote(uuid, safe='')}{query}", self._headers)

    async def list(self, query: str = "") -> Reply:
        """List items."""
        return await self._send("GET", f"/v1/media{query}", self._headers)

    async def forget(self, query: str = "?all=true") -> Reply:
        """Forget all items."""
        return await self._send("DELETE", f"/v1/media{query}", self._headers)

    async def _send(
        self, method: str, path: str, headers: Mapping[str, str], data: bytes | None = None
    ) -> Reply:
        url = URL(self._gateway.url + path, encoded=True)
        async with self._gateway.http.request(method, url, headers=headers, data=data) as response:
            return Reply(response.status, response.headers, await response.read())


def data_url(data: bytes) -> str:
    """Return a data URL of an image."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def keep_in_store(gateway: Gateway, path: Path, redis_url: str) -> None:
    """Have the gateway's fake encoder store what it encodes and bind uuids, as a real one does."""
    secrets = StoreSecrets.load(path / "store_secret")
    encoder = gateway.encoder

    async def keep(header: encoder_pb2.EncodeHeader, source: bytes) -> None:
        store = patient_store(redis_url, secrets)
        try:
            resolver = MediaResolver(store, secrets, encoder.fingerprint)
            context = context_from_proto(header.context)
            digest = source_digest(source)
            query = MediaQuery(
                Modality.IMAGE,
                options_from_proto(header.options),
                uuid=header.uuid,
                source_digest=digest,
                num_bytes=len(source),
            )
            encoder.id_of[source] = resolver.embedding_id(context, query, digest)
            ref = encoder.ref(source)
            buffers = [memoryview(bytes(spec.num_bytes)) for spec in ref.tensors]
            await store.put(context.tenant, Embedding(ref, buffers), encoder.layout())
            await resolver.bind(context, query, digest, encoder.layout().num_tokens)
        finally:
            # Whole, also if the caller goes away only now.
            await asyncio.shield(store.close())

    encoder.keep = keep
