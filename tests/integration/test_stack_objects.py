"""Media objects of a whole stack: put through one gateway, used and deleted through another."""

from __future__ import annotations

import base64
import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from chiasm.cli.main import app
from tests.fakes.checkpoints import make_qwen2_5_vl
from tests.harness import chat
from tests.harness.second_gateway import second_gateway
from tests.harness.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = make_qwen2_5_vl(tmp_path_factory.mktemp("model"))
    running = Stack(model, ["--dtype", "float32", "--allow-private-media", "127.0.0.0/8"])
    yield running
    assert running.stop() == 0


@pytest.fixture
def picture_url() -> Iterator[str]:
    """Yield the URL of a picture; it is served once."""
    picture = chat.picture(20, 83, 59)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(picture)))
            self.end_headers()
            self.wfile.write(picture)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/a.png"
        thread.join(5)


@pytest.fixture(scope="module")
def other_url(stack: Stack) -> Iterator[str]:
    with second_gateway(stack) as url:
        yield url


def call(url: str, method: str = "GET", body: object = None) -> tuple[int, dict[str, Any]]:
    """Send a request; return status and JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60.0) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def source(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def body_of(picture: bytes, **fields: object) -> dict[str, Any]:
    body = chat.chat_body("Describe the picture.", [picture], 12)
    body["messages"][0]["content"][0].update(fields)
    return body


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def num_encoded(stack: Stack) -> float:
    return stack.metric("chiasm_encoder_forward_seconds_count", "encoder-0")


def test_an_object_of_one_gateway_is_used_and_deleted_by_another(
    stack: Stack, other_url: str
) -> None:
    picture = chat.picture(1, 83, 59)
    uuid = "albums/1%2F2?x"
    path = f"/v1/media/{quote(uuid, safe='')}"
    named = {**body_of(picture, image_url=None, uuid=uuid), "include_media_usage": True}

    status, put = call(
        f"{stack.base_url}/v1/media", "POST", {"url": source(picture), "uuid": uuid, "ttl_s": 600}
    )
    encoded = num_encoded(stack)
    answer = chat.post_chat(other_url, named)
    whole = chat.post_chat(other_url, body_of(picture))

    assert (status, put["usage"]["cache"], put["bytes"]) == (200, "miss", len(picture))
    assert put["usage"]["encode_ms"] > 0
    assert put["usage"]["decode_ms"] > 0
    assert num_encoded(stack) == encoded
    assert text_of(answer) == text_of(whole)
    (receipt,) = answer["usage"]["media"]
    assert (receipt["uuid"], receipt["cache"], receipt["encode_ms"]) == (uuid, "hit", 0)
    assert receipt["tokens"] == put["tokens"]
    details = answer["usage"]["prompt_tokens_details"]
    assert details["multimodal_tokens"] == put["tokens"]

    _, got = call(f"{other_url}{path}")
    # In whole seconds, counted from those left: one less is within what they are told by.
    assert got["expires_at"] >= put["expires_at"] - 1
    changed = {"expires_at": got["expires_at"], "usage": put["usage"]}
    assert {**got, **changed} == {**put, **changed}
    assert call(f"{other_url}{path}", "DELETE")[0] == 200
    assert call(f"{stack.base_url}{path}")[0] == 404
    refusal = chat.refused_chat(stack.base_url, named)
    assert (refusal.status, refusal.error["code"]) == (400, "media_not_found")


def test_a_url_is_fetched_once_for_its_name(stack: Stack, picture_url: str) -> None:
    body = {"url": picture_url, "uuid": "by-url", "modality": "image"}

    _, first = call(f"{stack.base_url}/v1/media", "POST", body)
    _, second = call(f"{stack.base_url}/v1/media", "POST", body)

    assert first["usage"]["cache"] == "miss"
    assert first["usage"]["fetch_ms"] > 0
    assert (second["usage"]["cache"], second["usage"]["fetch_ms"]) == ("hit", 0)
    assert second["bytes"] == first["bytes"] == len(chat.picture(20, 83, 59))


def test_an_estimate_is_what_the_chat_then_costs(stack: Stack) -> None:
    picture = chat.picture(2, 120, 60)

    before = num_encoded(stack)
    _, estimate = call(f"{stack.base_url}/v1/media:estimate", "POST", {"url": source(picture)})
    after = num_encoded(stack)
    usage = chat.post_chat(stack.base_url, body_of(picture))["usage"]

    assert before == after
    assert estimate["tokens"] == usage["prompt_tokens_details"]["multimodal_tokens"]
    assert estimate["pixels"] == 112 * 56  # whole patches, merged two by two
    assert estimate["queue_units"] >= 120 * 60
    assert estimate["cache"] == "miss"


def test_a_chat_with_new_media_tells_what_each_took(stack: Stack) -> None:
    pictures = [chat.picture(seed, 60, 60) for seed in (10, 11, 10)]
    body = {**chat.chat_body("Compare.", pictures, 4), "include_media_usage": True}

    usage = chat.post_chat(stack.base_url, body)["usage"]

    assert [one["cache"] for one in usage["media"]][1] == "miss"
    assert {one["cache"] for one in usage["media"]} <= {"hit", "miss"}
    assert usage["media"][1]["encode_ms"] > 0
    assert all(one["fetch_ms"] == 0 for one in usage["media"])


def test_options_of_an_object_hold_for_chats_that_name_it(stack: Stack) -> None:
    picture = chat.picture(3, 200, 200)
    fields = {"url": source(picture), "uuid": "small", "max_pixels": 60 * 60}
    _, put = call(f"{stack.base_url}/v1/media", "POST", fields)
    # The same content is there in full, too, under another name.
    _, large = call(f"{stack.base_url}/v1/media", "POST", {"url": fields["url"], "uuid": "large"})

    usage = chat.post_chat(stack.base_url, body_of(picture, image_url=None, uuid="small"))["usage"]

    assert usage["prompt_tokens_details"]["multimodal_tokens"] == put["tokens"] < large["tokens"]


def test_the_command_line_does_it_all(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(chat.picture(4, 83, 59))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["media", "--server", stack.base_url, *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    estimate = json.loads(run("estimate", str(path)))
    put = json.loads(run("put", str(path), "--uuid", "cli/../x", "--ttl-s", "60"))
    got = json.loads(run("get", "cli/../x"))
    listed = run("ls")
    run("rm", "cli/../x")
    forgotten = json.loads(run("forget", "--all"))

    assert estimate["tokens"] == put["tokens"] == got["tokens"]
    assert any(line.endswith(" cli/../x") for line in listed.splitlines())
    assert forgotten["deleted"] is True
    assert run("ls") == ""
