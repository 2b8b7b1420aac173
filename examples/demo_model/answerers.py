"""The two ways to put a held-out question: to the model in this process, or to a server."""

import base64
import http.client
import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import torch
from transformers import Qwen2VLForConditionalGeneration

from .conversation import ConversationWriter
from .dataset import Sample, collate
from .held_out import HeldOutQuestion
from .pixels import CELL, PATCH, decode_picture, patchify, resize_picture
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_NEW_TOKENS = 96
TIMEOUT_S = 120.0


class AnswerError(Exception):
    """The server did not answer a question; the text says what it sent instead."""


class Answerer(Protocol):
    """Answers one question at a time."""

    def answer(self, question: HeldOutQuestion) -> str:
        """Return the text of the greedy answer."""


class LocalAnswerer:
    """Answer with the checkpoint of a folder, by ``transformers`` alone.

    Args:
        folder: Checkpoint in the layout of the hub.
        dtype: Type of the weights and of the arithmetic.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._model = Qwen2VLForConditionalGeneration.from_pretrained(str(folder), dtype=dtype)
        self._model.train(False)

    @torch.no_grad()
    def answer(self, question: HeldOutQuestion) -> str:
        """Return the text of the greedy answer."""
        pictures = [resize_picture(decode_picture(data)) for data, _ in question.files()]
        sides = [(picture.shape[1], picture.shape[2]) for picture in pictures]
        prompt = self._prompt(question, [(high // CELL, wide // CELL) for high, wide in sides])
        inputs: dict[str, torch.Tensor] = {"input_ids": prompt}
        if pictures:
            grids = [[1, high // PATCH, wide // PATCH] for high, wide in sides]
            inputs["pixel_values"] = torch.cat([patchify(picture) for picture in pictures])
            inputs["image_grid_thw"] = torch.tensor(grids)
            inputs["mm_token_type_ids"] = (prompt == self._model.config.image_token_id).int()
        # The generation mixin declares its ``self`` and its keywords too narrowly.
        generate: Callable[..., torch.Tensor] = self._model.generate  # type: ignore[assignment, misc]
        output = generate(
            **inputs,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        text: str = self._tokenizer.decode(output[0, prompt.shape[1] :].tolist())
        return text.strip()

    def _prompt(self, question: HeldOutQuestion, grids: list[tuple[int, int]]) -> torch.Tensor:
        writer = ConversationWriter(self._tokenizer)
        writer.open_user()
        if question.text_is_first:
            writer.add_question(question.turn.question)
        writer.add_pictures(grids)
        if not question.text_is_first:
            writer.add_question(question.turn.question)
        writer.open_answer()
        return collate([Sample([], [], writer.sequence)]).token_ids


class ServerAnswerer:
    """Answer by ``POST /v1/chat/completions`` of a server, pictures as data URLs.

    Args:
        url: Base address, such as ``http://127.0.0.1:8000``.
        api_key: Bearer token, if the server wants one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.hostname is None:
            raise ValueError(f"not an address of a server: {url!r}")
        self._host, self._port = parts.hostname, parts.port
        self._is_secure = parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model = str(json.loads(self._call("GET", "/v1/models", None))["data"][0]["id"])

    def answer(self, question: HeldOutQuestion) -> str:
        """Return the text of the greedy answer."""
        parts: list[dict[str, object]] = [
            {"type": "image_url", "image_url": {"url": _data_url(data, mime)}}
            for data, mime in question.files()
        ]
        text: dict[str, object] = {"type": "text", "text": question.turn.question}
        content = [text, *parts] if question.text_is_first else [*parts, text]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content if parts else text["text"]}],
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
        }
        reply = json.loads(self._call("POST", "/v1/chat/completions", json.dumps(body)))
        return str(reply["choices"][0]["message"]["content"]).strip()

    def _call(self, method: str, path: str, body: str | None) -> str:
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise AnswerError(f"{method} {path}: {response.status} {text[:300]}")
        return text


def _data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
