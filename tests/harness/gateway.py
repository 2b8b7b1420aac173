"""A gateway in this process, between fake encoders and generators over real gRPC."""

from __future__ import annotations

import base64
import io
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from chiasm.common.config import load_settings
from chiasm.common.secrets import StoreSecrets
from chiasm.common.service_token import load_or_create_service_token
from chiasm.gateway.config import GatewaySettings
from chiasm.gateway.service import build_server
from chiasm.gateway.tokenizer import Tokenizer
from tests.fakes.encoder_service import FakeEncoder, start_encoder
from tests.fakes.generator_service import FakeGenerator, Script, start_generator
from tests.fakes.tokenizers import write_text_side

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from chiasm.common.grpc_server import GrpcServer
    from chiasm.gateway.server import GatewayServer

MODEL = "tiny"
READY_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response with its whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as JSON."""
        document: dict[str, Any] = json.loads(self.body)
        return document

    @property
    def error(self) -> Mapping[str, Any]:
        """The object inside the error envelope."""
        error: Mapping[str, Any] = self.json()["error"]
        return error

    def events(self) -> list[str]:
        """Return the data of every server-sent event."""
        blocks = self.body.decode().split("\n\n")
        return [block.removeprefix("data: ") for block in blocks if block]

    def chunks(self) -> list[dict[str, Any]]:
        """Return the JSON of every event but the last, which must be ``[DONE]``."""
        *chunks, done = self.events()
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]


class Gateway:
    """The gateway under test with its fakes and an HTTP client."""

    def __init__(
        self,
        server: GatewayServer,
        encoder: FakeEncoder,
        generator: FakeGenerator,
        tokenizer: Tokenizer,
        peers: tuple[GrpcServer, GrpcServer],
        http: aiohttp.ClientSession,
    ) -> None:
        self.server = server
        self.encoder = encoder
        self.generator = generator
        self.tokenizer = tokenizer
        self.encoder_server, self.generator_server = peers
        self.http = http

    @property
    def url(self) -> str:
        """URL of the REST API."""
        return f"http://127.0.0.1:{self.server.http_port}"

    @property
    def grpc_address(self) -> str:
        """Address of ``ChatService``."""
        return f"127.0.0.1:{self.server.grpc_port}"

    def say(self, *texts: str, script: Script | None = None) -> None:
        """Have the generator answer with ``texts``, one step each, and its end token."""
        deltas = [self.tokenizer.encode(text) for text in texts]
        end = self.tokenizer.encode("<|im_end|>")
        self.generator.script = script or Script(deltas=[*deltas, end], stop_token_id=end[0])

    def forget(self) -> None:
        """Forget what the fakes were told and saw, so that the next test starts afresh."""
        self.encoder.forget()
        self.generator.forget()

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        """Send a GET request."""
        async with self.http.get(self.url + path, headers=headers) as response:
            return Reply(response.status, response.headers, await response.read())

    async def post(
        self, body: object, headers: Mapping[str, str] | None = None, *, data: bytes | None = None
    ) -> Reply:
        """Send a chat request: ``body`` as JSON, or ``data`` as it is."""
        sent = data if data is not None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        url = f"{self.url}/v1/chat/completions"
        async with self.http.post(url, data=io.BytesIO(sent), headers=headers) as response:
            return Reply(response.status, response.headers, await response.read())

    async def post_form(self, parts: Mapping[str, bytes]) -> Reply:
        """Send a chat request as a form; every part is a file but the one named ``request``."""
        with aiohttp.MultipartWriter("form-data") as form:
            for name, data in parts.items():
                part = form.append(data)
                part.set_content_disposition("form-data", name=name)
        url = f"{self.url}/v1/chat/completions"
        async with self.http.post(url, data=form) as response:
            return Reply(response.status, response.headers, await response.read())

    async def ask(self, content: object, **fields: object) -> Reply:
        """Send one user message."""
        messages = [{"role": "user", "content": content}]
        return await self.post({"model": MODEL, "messages": messages, **fields})


def image_part(data: bytes, **fields: object) -> dict[str, object]:
    """Return a content part with an image in a data URL."""
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}, **fields}


@asynccontextmanager
async def run_gateway(
    path: Path, flags: Sequence[str] = (), *, has_videos: bool = False
) -> AsyncIterator[Gateway]:
    """Run a gateway with fakes until the context is left.

    Args:
        path: Empty folder for the checkpoint and the secrets.
        flags: Further flags of the gateway.
        has_videos: Whether the encoder takes videos besides images.
    """
    model = write_text_side(path / MODEL)
    token = load_or_create_service_token(path / "service_token")
    StoreSecrets.load_or_create(path / "store_secret")
    tokenizer = Tokenizer.load(model)
    (placeholder_id,) = tokenizer.encode("<|image_pad|>")
    encoder = FakeEncoder(placeholder_id)
    if has_videos:
        (encoder.video_placeholder_id,) = tokenizer.encode("<|video_pad|>")
    generator = FakeGenerator(eos_token_ids=tokenizer.encode("<|im_end|>"))
    encoder_server, encoder_port = await start_encoder(encoder, token)
    generator_server, generator_port = await start_generator(generator, token)
    arguments = [
        *("--model", str(model), "--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"),
        *("--encoders", f"127.0.0.1:{encoder_port}"),
        *("--generators", f"127.0.0.1:{generator_port}"),
        *("--service-token-file", str(path / "service_token")),
        *("--store-secret-file", str(path / "store_secret"), "--drain-s", "0"),
        *("--store-timeout-s", "2", *flags),
    ]
    server = build_server(load_settings(GatewaySettings, "gateway", arguments, {}))
    await server.start("127.0.0.1:0")
    try:
        await server.wait_ready(READY_TIMEOUT_S)
        async with aiohttp.ClientSession() as http:
            peers = (encoder_server, generator_server)
            yield Gateway(server, encoder, generator, tokenizer, peers, http)
    finally:
        await server.stop()
        await encoder_server.stop(0)
        await generator_server.stop(0)
