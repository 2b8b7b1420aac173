"""``chiasm media`` against a server that writes down what it is asked."""

from __future__ import annotations

import json
import os
import threading
import time
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from chiasm.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typer.testing import Result

_ITEM = {
    "uuid": "cat",
    "object": "media",
    "modality": "image",
    "tokens": 64,
    "bytes": None,
    "created_at": 0,
    "expires_at": time.time() + 1000,
    "ttl_s": 60,
}


class Server:
    """Answers with ``answers``, one after the other; remembers requests.

    Attributes:
        url: Its URL.
        answers: Status and body of the answers to come.
        seen: Method, path, headers and body of each request.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.seen: list[tuple[str, str, Message, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.seen.append((self.command, self.path, self.headers, body))
                status, document = outer.answers.pop(0)
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - named by the base

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer nothing more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def run(server: Server | str, *arguments: str) -> Result:
    url = server if isinstance(server, str) else server.url
    env = {"CHIASM_SERVER": url, "CHIASM_API_KEY": "key-1"}
    return CliRunner().invoke(app, ["media", *arguments], env=env)


def test_a_file_is_put_as_a_form_with_its_type(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"\x89PNG\r\n--x\r\n")
    server.answers.append((200, _ITEM))

    result = run(server, "put", str(path), "--uuid", "a/b", "--ttl-s", "60")

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["uuid"] == "cat"
    ((method, url, headers, body),) = server.seen
    assert (method, url) == ("POST", "/v1/media")
    assert headers["authorization"] == "Bearer key-1"
    head = f"content-type: {headers['content-type']}\r\n\r\n".encode()
    parts = BytesParser().parsebytes(head + body).get_payload()
    assert isinstance(parts, list)
    contents = {
        str(part.get_param("name", header="content-disposition")): part
        for part in parts
        if isinstance(part, Message)
    }
    assert contents["file"].get_content_type() == "image/png"
    assert contents["uuid"].get_payload() == "a/b"
    assert contents["ttl_s"].get_payload() == "60"
    assert b"\r\n\r\n\x89PNG\r\n--x\r\n\r\n--" in body


def test_a_url_is_put_as_json(server: Server) -> None:
    server.answers.append((200, _ITEM))

    result = run(server, "put", "https://host/a.png", "--modality", "image")

    assert result.exit_code == 0, result.output
    assert json.loads(server.seen[0][3]) == {"url": "https://host/a.png", "modality": "image"}


def test_names_are_encoded_whole(server: Server) -> None:
    server.answers += [(200, _ITEM), (200, {"deleted": True})]

    assert run(server, "get", "../a b%20?#", "--cache-salt", "s&1").exit_code == 0
    assert run(server, "rm", "x/y").exit_code == 0

    assert [(method, path) for method, path, _, _ in server.seen] == [
        ("GET", "/v1/media/%2E%2E%2Fa%20b%2520%3F%23?cache_salt=s%261"),
        ("DELETE", "/v1/media/x%2Fy"),
    ]


def test_a_listing_follows_the_pages_to_the_end(server: Server) -> None:
    server.answers += [
        (200, {"data": [_ITEM], "has_more": True, "last_id": "7.ab"}),
        (200, {"data": [], "has_more": True, "last_id": "9"}),
        (200, {"data": [{**_ITEM, "uuid": "dog", "bytes": 5}], "has_more": False, "last_id": None}),
    ]

    result = run(server, "ls")

    assert result.exit_code == 0, result.output
    assert [line.split()[1:] for line in result.stdout.splitlines()] == [
        ["image", "64", "-", "cat"],
        ["image", "64", "5", "dog"],
    ]
    assert [path for _, path, _, _ in server.seen] == [
        "/v1/media?limit=100",
        "/v1/media?limit=100&after=7.ab",
        "/v1/media?limit=100&after=9",
    ]


def test_forgetting_needs_the_flag(server: Server) -> None:
    server.answers.append((200, {"deleted": True, "count": 3}))

    refused, done = run(server, "forget"), run(server, "forget", "--all")

    assert refused.exit_code == 2
    assert json.loads(done.stdout)["count"] == 3
    assert [(method, path) for method, path, _, _ in server.seen] == [
        ("DELETE", "/v1/media?all=true")
    ]


def test_an_estimate_is_shown(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    server.answers.append((200, {"tokens": 5}))

    result = run(server, "estimate", str(tmp_path / "a.png"))

    assert json.loads(result.stdout) == {"tokens": 5}
    assert server.seen[0][1] == "/v1/media:estimate"


def test_a_refusal_is_told_in_the_words_of_the_server(server: Server) -> None:
    server.answers.append((404, {"error": {"message": "There is none.", "code": "x"}}))

    result = run(server, "get", "cat")

    assert result.exit_code == 1
    assert result.stderr == "chiasm media: There is none.\n"


@pytest.mark.parametrize("document", [b"<html>", b"[]", {"error": None}])
def test_an_answer_of_another_kind_of_server_is_told(server: Server, document: object) -> None:
    server.answers.append((502, document))

    result = run(server, "get", "cat")

    assert result.exit_code == 1
    assert "502" in result.stderr


def test_what_cannot_be_reached_or_read_is_told(server: Server, tmp_path: Path) -> None:
    server.stop()

    results = [
        run(server, "ls"),
        run("ftp://host", "ls"),
        run(server, "put", str(tmp_path / "none.png")),
    ]

    assert [result.exit_code for result in results] == [1, 1, 1]
    assert "does not answer" in results[0].stderr
    assert "is not a URL" in results[1].stderr
    assert "cannot be read" in results[2].stderr


@pytest.mark.parametrize("command", ["put", "estimate"])
def test_pipe_is_refused_before_the_server_is_asked(server: Server, command: str) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"\x89PNG")
    os.close(writer)

    result = run(server, command, f"/dev/fd/{reader}")

    assert result.exit_code == 1
    assert "is no regular file; name one, or write what a pipe yields into one" in result.stderr
    assert server.seen == []
    assert os.read(reader, 4) == b"\x89PNG"
    os.close(reader)


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:abc", "http://127.0.0.1:65536"])
def test_url_of_a_server_that_cannot_be_is_told(url: str) -> None:
    result = run(url, "ls")

    assert result.exit_code == 1
    assert f"{url} is not a URL such as" in result.stderr
