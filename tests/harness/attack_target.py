"""A whole stack under attack: send over both entry points, watch processes, memory and canary."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc

from chiasm.common.rpc_status import error_from_status
from chiasm.gateway.rest.errors import status_of
from chiasm.v1 import chat_pb2, chat_pb2_grpc, generator_pb2
from tests.harness import chat
from tests.harness.attack import (
    ANSWERED,
    DEFAULT_BUDGET_BYTES,
    ENTRIES,
    REST,
    Attack,
    Part,
    Site,
    file,
    text,
)
from tests.harness.loopback_site import ALLOWED, NAMES, LoopbackSite
from tests.harness.process_usage import forget_peaks, read_peak
from tests.harness.stack import Stack, StackError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

SERVICES = ("redis", "encoder-0", "generator", "gateway")
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
FLAGS = (
    *("--dtype", "float32", "--allow-private-media", f"{ALLOWED}/32"),
    *("--limit-mm-per-prompt", "image=64,video=2,audio=2"),
    *("--image-fetch-timeout-s", "1", "--video-fetch-timeout-s", "1"),
    *("--audio-fetch-timeout-s", "1"),
)
GOOD_PICTURE = chat.picture(1, 64, 64)
LEAK = re.compile(r"\b0x[0-9a-f]{6,}|Traceback|<\w[\w.]* object|(/[\w.-]+){2,}/?", re.IGNORECASE)
NUM_TOKENS = 4
_TIMEOUT_S = 100.0
_MAX_MESSAGE_BYTES = 64 << 20
_NAME_TABLE = Path(__file__).parents[1] / "fakes" / "name_table"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, over either entry point.

    Attributes:
        status: HTTP status; over gRPC the one that REST has for the same error.
        code: Code of the refusal; ``ANSWERED`` if there is none.
        body: Everything that was sent back.
        text: Text of an answer.
        prompt_tokens: Tokens of the prompt that was answered.
        media_tokens: Those that stand for media.
        cache: How each media item came to be available.
        cached_tokens: Tokens of the prompt that the prefix cache knew.
    """

    status: int
    code: str
    body: str
    text: str = ""
    prompt_tokens: int = 0
    media_tokens: int = 0
    cache: tuple[str, ...] = ()
    cached_tokens: int = 0


@dataclass(slots=True)
class Totals:
    """What all attacks together came to."""

    num_cells: int = 0
    num_leaks: int = 0
    num_foreign_hits: int = 0
    num_wrong_content_hits: int = 0
    peak_bytes: int = 0
    peak_name: str = ""
    codes: Counter[str] = field(default_factory=Counter)


class AttackTarget:
    """A running stack with two tenants, and the loopback servers around it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.totals = Totals()
        self.tokenizer_file = model / "tokenizer.json"
        self._folder = folder
        self._servers = LoopbackSite(GOOD_PICTURE)
        self._num_good = 0
        keys = folder / "keys"
        keys.write_text("".join(f"{tenant} {key}\n" for tenant, key in KEYS.items()))
        path = os.pathsep.join([str(_NAME_TABLE), os.environ.get("PYTHONPATH", "")])
        env = {"PYTHONPATH": path, "TEST_NAME_TABLE": json.dumps(NAMES)}
        self.stack = Stack(model, [*FLAGS, "--api-keys-file", str(keys)], env)

    def __enter__(self) -> Self:
        """Start the servers and note what is normal."""
        self._servers.__enter__()
        secret = self._folder / "secret.txt"
        secret.write_text("a secret of the server\n" * 99)
        # Times in the past: the first to read the file changes them.
        os.utime(secret, (1, 1))
        self.site = Site(self._servers.port, secret)
        options = [("grpc.max_send_message_length", _MAX_MESSAGE_BYTES)]
        self._channel = grpc.insecure_channel(self.stack.grpc_address, options=options)
        self.stub = chat_pb2_grpc.ChatServiceStub(self._channel)
        self.pids = self._read_pids()
        self.good_answer = self.ask_good(REST)
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop all."""
        self._channel.close()
        status = self.stack.stop()
        self._servers.__exit__()
        assert status == 0

    @property
    def num_deaths(self) -> int:
        """Services that do not run, or not in the process that they began in."""
        return sum(self._read_pids()[name] != pid for name, pid in self.pids.items())

    @property
    def num_worker_deaths(self) -> float:
        """Decode workers that died; what these had taken is in no peak."""
        return self.stack.metric("chiasm_encoder_worker_deaths_total", "encoder-0")

    @property
    def num_forbidden(self) -> int:
        """Connections to addresses that must not be dialled."""
        return self._servers.num_forbidden

    @property
    def num_allowed(self) -> int:
        """Connections to the one address that may be dialled."""
        return self._servers.num_allowed

    def check_attack(self, attack: Attack, entry: str) -> Reply:
        """Send an attack, check everything that holds for all of them, and return the reply."""
        parts = attack.parts(self.site)
        with self.unharmed(f"{attack.name} over {entry}", attack.budget_bytes):
            # A salt for each entry: what one has encoded is no hit of the other.
            reply = self.send(entry, parts, salt=f"over-{entry}", fields=attack.fields)
            self.check_reply(reply, attack.codes, repr([part.rest for part in parts]))
        return reply

    def check_reply(self, reply: Reply, codes: Collection[str], sent: str) -> None:
        """Check that a reply is an honest answer or a refusal that tells nothing of the server.

        Args:
            reply: The reply.
            codes: Codes that it may have; ``ANSWERED`` for an answer.
            sent: What was sent; a refusal may repeat it.
        """
        self.totals.num_cells += 1
        self.totals.codes[reply.code or "answered"] += 1
        assert reply.code in codes, reply
        assert reply.status == 200 or 400 <= reply.status < 500, reply
        if reply.code != ANSWERED:
            leaks = [found[0] for found in LEAK.finditer(reply.body) if found[0] not in sent]
            self.totals.num_leaks += len(leaks)
            assert leaks == [], reply.body

    @contextmanager
    def unharmed(self, name: str, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> Iterator[None]:
        """Check that what is done inside costs little, kills nobody and reaches nothing."""
        for pid in self.pids.values():
            forget_peaks(pid)
        baseline, num_forbidden = self._read_peak(), self.num_forbidden
        yield
        assert self._read_pids() == self.pids, "a service has died"
        peak_bytes = self._read_peak() - baseline
        if peak_bytes > self.totals.peak_bytes:
            self.totals.peak_bytes, self.totals.peak_name = peak_bytes, name
        assert self.num_forbidden == num_forbidden, "an address was dialled that must not be"
        assert self.site.secret.stat().st_atime == 1, "a file of the server was read"
        assert peak_bytes <= budget_bytes, f"{peak_bytes >> 20} MiB over the baseline"
        # Over one entry point after the other: both give the same text.
        entry = ENTRIES[self._num_good % len(ENTRIES)]
        assert self.ask_good(entry) == self.good_answer, "a good request is answered otherwise"

    def ask_good(self, entry: str) -> str:
        """Ask about a picture that has to be encoded each time, and return the answer."""
        self._num_good += 1
        parts = [file(GOOD_PICTURE), text("What is this?")]
        reply = self.send(entry, parts, salt=f"good-{self._num_good}")
        assert reply.code == ANSWERED, reply
        return reply.text

    def send(
        self,
        entry: str,
        parts: Sequence[Part],
        *,
        tenant: str = "alice",
        salt: str = "",
        fields: Mapping[str, object] | None = None,
    ) -> Reply:
        """Send one message over an entry point; ``fields`` are further ones of a REST body."""
        if entry == REST:
            body = {
                "messages": [{"role": "user", "content": [part.rest for part in parts]}],
                **{"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True},
                **{"include_media_usage": True, **({"cache_salt": salt} if salt else {})},
                **(fields or {}),
            }
            return self.post(json.dumps(body).encode(), "application/json", tenant)
        content = [part.grpc for part in parts]
        message = chat_pb2.ChatMessage(role=chat_pb2.CHAT_ROLE_USER, content=content)
        sampling = generator_pb2.SamplingParams(
            temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True
        )
        request = chat_pb2.ChatCompletionRequest(
            messages=[message], sampling=sampling, cache_salt=salt, include_media_usage=True
        )
        return self._call(request, tenant)

    def post(self, body: bytes, content_type: str, tenant: str = "alice") -> Reply:
        """Send the body of a chat over REST."""
        headers = {"content-type": content_type, "authorization": f"Bearer {KEYS[tenant]}"}
        address = f"{self.stack.base_url}/v1/chat/completions"
        request = urllib.request.Request(address, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                return _read_answer(response.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                content = error.read().decode()
                return Reply(error.code, json.loads(content)["error"]["code"], content)

    def _call(self, request: chat_pb2.ChatCompletionRequest, tenant: str) -> Reply:
        metadata = (("authorization", f"Bearer {KEYS[tenant]}"),)
        try:
            answer = self.stub.ChatCompletion(request, timeout=_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return refusal_of(error)
        names = {1: "hit", 2: "miss", 3: "inline"}
        cache = tuple(names[media.cache] for media in answer.usage.media)
        usage = answer.usage
        return Reply(
            200,
            ANSWERED,
            answer.text,
            answer.text,
            usage.prompt_tokens,
            usage.media_tokens,
            cache,
            usage.cached_tokens,
        )

    def _read_peak(self) -> int:
        return sum(map(read_peak, self.pids.values()))

    def _read_pids(self) -> dict[str, int]:
        pids = dict.fromkeys(SERVICES, 0)
        with suppress(StackError):
            pids.update({name: self.stack.pid(name) for name in SERVICES})
        return pids


def refusal_of(error: grpc.RpcError) -> Reply:
    """Return how a gRPC call was refused."""
    if not isinstance(error, grpc.Call):
        raise error
    trailing = error.trailing_metadata()
    found = error_from_status(error.code(), trailing, error.details())
    body = f"{error.details()} {dict(trailing or ())!r}"
    return Reply(status_of(found), found.reason.lower(), body)


def _read_answer(body: str) -> Reply:
    document: dict[str, Any] = json.loads(body)
    usage = document["usage"]
    details = usage["prompt_tokens_details"]
    return Reply(
        200,
        ANSWERED,
        body,
        document["choices"][0]["message"]["content"],
        usage["prompt_tokens"],
        details["multimodal_tokens"],
        tuple(media["cache"] for media in usage.get("media") or ()),
        details["cached_tokens"],
    )
