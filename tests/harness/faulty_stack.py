"""A stack whose Redis is made to fail, and pictures with the answers that are right."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from redis import Redis

from chiasm.common.embedded_redis import SOCKET_NAME
from tests.harness import chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.harness.stack import Stack

T = TypeVar("T")

_SEEDS = count(1)
_RECOVERY_S = 10.0
_RESTART_TIMEOUT_S = 90.0
_POLL_PAUSE_S = 0.02
# Longer than two calls that time out one after the other, the gateway's and the encoder's.
_PAUSE_MS = 6000


class FaultyStack:
    """A stack, its Redis, and pictures with the answers that are right."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.redis = Redis(unix_socket_path=str(stack.state_dir / "redis.sock"))

    def new_picture(self) -> bytes:
        """Return a picture that was never asked about."""
        return chat.picture(next(_SEEDS), 60, 60)

    def picture(self) -> tuple[bytes, str]:
        """Return a picture that the store does not have, and the text that answers it."""
        picture = self.new_picture()
        # A salt makes it another item, which leaves the one without a salt unknown.
        return picture, self.ask(picture, cache_salt="gold")[0]

    def ask(self, picture: bytes | None, uuid: str = "", **fields: object) -> tuple[str, str]:
        """Ask about a picture; return the text and where its embedding came from."""
        answer = chat.post_chat(self.stack.base_url, body_of(picture, uuid, **fields))
        text: str = answer["choices"][0]["message"]["content"]
        return text, answer["usage"]["media"][0]["cache"]

    def ask_all(self, pictures: list[tuple[bytes, str]]) -> int:
        """Ask about all pictures at once; return how many answers are wrong; raise on an error."""
        with ThreadPoolExecutor(len(pictures)) as pool:
            answers = list(pool.map(lambda one: self.ask(one[0])[0], pictures))
        return sum(text != gold for text, (_, gold) in zip(answers, pictures, strict=True))

    def restart_all_but_redis(self) -> None:
        """Kill all services at once and wait until the stack is ready again."""
        pids = [self.stack.kill(name) for name in ("encoder-0", "generator", "gateway")]
        deadline = time.monotonic() + _RESTART_TIMEOUT_S
        while any(Path(f"/proc/{pid}").exists() for pid in pids) or not self._is_ready():
            assert time.monotonic() < deadline, "the stack is not ready again"
            threading.Event().wait(_POLL_PAUSE_S)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.stack.base_url}/ready", timeout=5.0):
                return True
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        return False

    def num_encoded(self) -> int:
        """Return how many items went through the tower."""
        return int(self.stack.metric("chiasm_encoder_encoded_items_total", "encoder-0"))

    def count(self, metric: str, labels: str = "") -> int:
        """Return a counter of the store, of all services together."""
        services = ("gateway", "encoder-0", "generator")
        return int(sum(self.stack.metric(metric, service, labels) for service in services))

    def lookups(self, service: str, result: str) -> int:
        """Return how often ``service`` has looked an embedding up with this result."""
        return int(self.stack.metric("chiasm_store_lookups_total", service, f'result="{result}"'))

    def loads(self, source: str) -> int:
        """Return how many embeddings the generator has had from ``source``."""
        return int(
            self.stack.metric(
                "chiasm_generator_embedding_loads_total", "generator", f'source="{source}"'
            )
        )

    def keys(self, *, chunks: bool) -> list[bytes]:
        """Return the keys of chunks, or those of manifests."""
        names: list[bytes] = list(self.redis.scan_iter("chiasm:*"))
        if chunks:
            return [name for name in names if name.rsplit(b":", 1)[-1].isdigit()]
        return [name for name in names if name.endswith(b":m")]


def body_of(picture: bytes | None, uuid: str = "", **fields: object) -> dict[str, Any]:
    body = chat.chat_body("Describe the picture.", [picture or b""], 8)
    part = body["messages"][0]["content"][0]
    part.update({"uuid": uuid} if uuid else {}, **({} if picture else {"image_url": None}))
    return {**body, "include_media_usage": True, **fields}


def wait_until_stored(faulty: FaultyStack) -> float:
    """Return after how many seconds new pictures are stored again."""
    started = time.monotonic()
    while time.monotonic() < started + _RECOVERY_S:
        picture = faulty.new_picture()
        if [faulty.ask(picture)[1] for _ in range(2)] == ["miss", "hit"]:
            return time.monotonic() - started
    raise AssertionError("the store is not used again")


@contextmanager
def hung(faulty: FaultyStack, how: str) -> Iterator[None]:
    if how == "pause":
        faulty.redis.client_pause(_PAUSE_MS)
        yield
        faulty.redis.ping()  # is answered when the pause is over
        return
    with stopped(faulty, "redis"):
        yield


@contextmanager
def dead(faulty: FaultyStack) -> Iterator[None]:
    """Let there be no Redis: it is killed and, while this lasts, cannot be started again."""
    socket = faulty.stack.state_dir / SOCKET_NAME
    faulty.stack.kill("redis")
    socket.unlink()
    socket.mkdir()  # in the way of a new socket
    try:
        yield
    finally:
        socket.rmdir()
    faulty.stack.wait_until_ready("redis")


@contextmanager
def stopped(faulty: FaultyStack, name: str) -> Iterator[None]:
    """Let service ``name`` do nothing."""
    pid = faulty.stack.kill(name, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def evict_before_it_is_read(faulty: FaultyStack, request: Callable[[], T]) -> T:
    """Return what comes of a request whose embedding the gateway has found but nobody has read.

    Everything is evicted while the generator, which reads embeddings, does nothing.
    """
    found = faulty.lookups("gateway", "hit")
    with ThreadPoolExecutor(1) as pool:
        with stopped(faulty, "generator"):
            outcome = pool.submit(request)
            deadline = time.monotonic() + _RECOVERY_S
            while faulty.lookups("gateway", "hit") == found and time.monotonic() < deadline:
                threading.Event().wait(_POLL_PAUSE_S)
            faulty.redis.delete(*faulty.keys(chunks=True), *faulty.keys(chunks=False))
        assert faulty.lookups("gateway", "hit") == found + 1
        return outcome.result()


@contextmanager
def full(faulty: FaultyStack) -> Iterator[None]:
    """Let Redis take no more and evict nothing."""
    names = ("maxmemory-policy", "maxmemory")
    before = {name: str(faulty.redis.config_get(name)[name]) for name in names}
    for name, value in zip(names, ("noeviction", "1mb"), strict=True):
        faulty.redis.config_set(name, value)
    try:
        yield
    finally:
        for name in names:
            faulty.redis.config_set(name, before[name])
