"""Speak ``/v1/media`` with a gateway over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import mimetypes
import stat
import urllib.parse
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Fields = Mapping[str, str | int]

_READ_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 4 << 20
_URL_SCHEMES = ("http://", "https://", "data:")


class MediaClientError(Exception):
    """The server refused, does not answer, or a file cannot be read; the text says which."""


class MediaClient:
    """A client of one server; every call opens a connection of its own."""

    def __init__(self, server: str, api_key: str, timeout_s: float) -> None:
        """Take what to talk to.

        Args:
            server: URL of the server, without ``/v1``.
            api_key: Key to show; empty: none.
            timeout_s: Seconds without progress before a call is given up.

        Raises:
            MediaClientError: The URL is none.
        """
        try:
            parts = urllib.parse.urlsplit(server)
            # Only whoever asks for the port is told that it is none.
            is_url = parts.scheme in ("http", "https") and bool(parts.netloc) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise MediaClientError(f"{server} is not a URL such as http://127.0.0.1:8000.")
        self._parts = parts
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def put(self, source: str, fields: Fields) -> dict[str, Any]:
        """Have the file or URL ``source`` encoded and kept."""
        return self._send_source("/v1/media", source, fields)

    def estimate(self, source: str, fields: Fields) -> dict[str, Any]:
        """Ask what the file or URL ``source`` would cost."""
        return self._send_source("/v1/media:estimate", source, fields)

    def get(self, name: str, query: Fields) -> dict[str, Any]:
        """Describe the item that ``name`` names."""
        return self._call("GET", _item_path(name, query))

    def delete(self, name: str, query: Fields) -> dict[str, Any]:
        """Forget the item that ``name`` names."""
        return self._call("DELETE", _item_path(name, query))

    def items(self, query: Fields) -> Iterator[dict[str, Any]]:
        """Yield every item, asking for one page after the other."""
        after: dict[str, str] = {}
        while True:
            page = self._call("GET", _path("/v1/media", {**query, "limit": 100, **after}))
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def forget(self) -> dict[str, Any]:
        """Forget every item of the tenant."""
        return self._call("DELETE", "/v1/media?all=true")

    def _send_source(self, path: str, source: str, fields: Fields) -> dict[str, Any]:
        if source.lower().startswith(_URL_SCHEMES):
            body = json.dumps({**fields, "url": source}).encode()
            headers = {"content-type": "application/json"}
            return self._call("POST", path, iter([body]), len(body), headers)
        form = _Form(Path(source), fields)
        return self._call("POST", path, form.pieces(), form.num_bytes, form.headers)

    def _call(
        self,
        method: str,
        path: str,
        body: Iterator[bytes] | None = None,
        num_bytes: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        length = {"content-length": str(num_bytes)} if body is not None else {}
        connection = self._connect()
        try:
            # A server that refuses a body need not read all of it; its answer tells why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(
                    method,
                    self._parts.path.rstrip("/") + path,
                    body,
                    {**self._headers, **length, **(headers or {})},
                )
            response = connection.getresponse()
            return _document(response.status, response.read(_MAX_ANSWER_BYTES))
        except (OSError, http.client.HTTPException) as error:
            raise MediaClientError(f"{self._parts.netloc} does not answer: {error}.") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        is_https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
        return kind(self._parts.netloc, timeout=self._timeout_s)


class _Form:
    """A multipart/form-data body with one file, sent in pieces."""

    def __init__(self, path: Path, fields: Fields) -> None:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise MediaClientError(
                    f"{path} is no regular file; name one, or write what a pipe yields into one."
                )
            path.open("rb").close()
        except OSError as error:
            raise MediaClientError(f"{path} cannot be read: {error.strerror}.") from error
        self._file_bytes = status.st_size
        self._path = path
        boundary = uuid.uuid4().hex
        content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        parts = [
            f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        parts.append(
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="file"\r\n'
            f"content-type: {content_type}\r\n\r\n"
        )
        self._head = "".join(parts).encode()
        self._tail = f"\r\n--{boundary}--\r\n".encode()
        self.headers = {"content-type": f"multipart/form-data; boundary={boundary}"}

    @property
    def num_bytes(self) -> int:
        return len(self._head) + self._file_bytes + len(self._tail)

    def pieces(self) -> Iterator[bytes]:
        yield self._head
        with self._path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                yield piece
        yield self._tail


def _item_path(name: str, query: Fields) -> str:
    # A dot segment is encoded too, or clients and proxies on the way would take it away.
    return _path(f"/v1/media/{urllib.parse.quote(name, safe='').replace('.', '%2E')}", query)


def _path(path: str, query: Fields) -> str:
    return f"{path}?{urllib.parse.urlencode(query)}" if query else path


def _document(status: int, body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise MediaClientError(f"The server answers {status} and no JSON.")
    if status != 200:
        error = document.get("error")
        message = error.get("message") if isinstance(error, dict) else None
        raise MediaClientError(str(message or f"The server answers {status}."))
    return document
