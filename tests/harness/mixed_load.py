"""Load of all kinds at once: text and pictures, clients that leave, requests that are refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import aiohttp

from tests.harness import chat

# Of twenty requests in a row two are refused, four are cancelled midway, and two clients leave
# while their media are looked up or encoded.
ROUND = 20
REFUSED_TURNS = (3, 14)
CANCELLED_TURNS = (1, 6, 11, 16)
LEFT_TURNS = (8, 18)
LONGEST_STAY_S = 0.03
PICTURE_PART = 0.4
NUM_PICTURES = 24
MAX_TOKENS = 24
# So many that a lost cancel is noticed by what it goes on to hold.
NUM_CANCELLED_TOKENS = 1500
REQUEST_TIMEOUT_S = 30.0
QUESTIONS = ("What is this?", "Describe the picture in a few words.", "Which shape, which color?")


class MixedLoad:
    """Sends requests from several workers and counts how they ended.

    Attributes:
        counts: Requests by ``complete``, ``cancelled``, ``left``, ``refused``, or ``wrong: ...``.
    """

    def __init__(self, base_url: str, seed: int) -> None:
        self._url = f"{base_url}/v1/chat/completions"
        self._random = random.Random(seed)
        # A fixed set: caches of embeddings fill once, and memory can settle.
        self._pictures = [
            chat.picture(seed * 1000 + i, self._side(), self._side()) for i in range(NUM_PICTURES)
        ]
        self._turns = itertools.count()
        self.counts: Counter[str] = Counter()

    async def run(self, duration_s: float, num_workers: int) -> None:
        """Send requests for ``duration_s`` seconds and wait for the last answers.

        Args:
            duration_s: Seconds within which requests are begun.
            num_workers: Requests in flight.
        """
        end = time.monotonic() + duration_s
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        ) as session:
            await asyncio.gather(*(self._work(session, end) for _ in range(num_workers)))

    async def _work(self, session: aiohttp.ClientSession, end: float) -> None:
        while time.monotonic() < end:
            turn = next(self._turns) % ROUND
            try:
                if turn in REFUSED_TURNS:
                    outcome = await self._send_wrong(session)
                elif turn in LEFT_TURNS:
                    outcome = await self._leave(session)
                elif turn in CANCELLED_TURNS:
                    cancel_after = self._random.randint(0, MAX_TOKENS - 2)
                    outcome = await self._stream(
                        session, self._body(NUM_CANCELLED_TOKENS), cancel_after
                    )
                else:
                    num_tokens = self._random.randint(1, MAX_TOKENS)
                    outcome = await self._stream(session, self._body(num_tokens), None)
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome = f"wrong: {type(error).__name__}"
            self.counts[outcome] += 1

    async def _stream(
        self, session: aiohttp.ClientSession, body: dict[str, Any], cancel_after: int | None
    ) -> str:
        """Stream an answer; hang up after ``cancel_after`` events if that is given."""
        num_events = 0
        finish_reason = None
        async with session.post(self._url, json={**body, "stream": True}) as response:
            if response.status != 200:
                return f"wrong: {response.status} {(await response.text())[:200]}"
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return f"wrong: {event['error']}"
                for choice in event["choices"]:
                    finish_reason = choice["finish_reason"] or finish_reason
                num_events += 1
                if cancel_after is not None and num_events > cancel_after:
                    response.close()
                    return "cancelled"
        return "complete" if finish_reason == "length" else f"wrong: ended by {finish_reason}"

    async def _send_wrong(self, session: aiohttp.ClientSession) -> str:
        body = self._random.choice(
            (
                json.dumps({**self._body(4), "temperature": -1}).encode(),
                json.dumps({**self._body(4), "messages": "none"}).encode(),
                json.dumps(chat.chat_body("What?", [b"not a picture" * 9], 4)).encode(),
                json.dumps(chat.chat_body("What?", [self._pictures[0][:-40]], 4)).encode(),
                json.dumps(self._body_with_unknown_item()).encode(),
                b'{"messages": [',
            )
        )
        headers = {"content-type": "application/json"}
        async with session.post(self._url, data=body, headers=headers) as response:
            error = (await response.json())["error"]
            is_refused = 400 <= response.status < 500 and error["message"]
        return "refused" if is_refused else f"wrong: refusal expected, got {response.status}"

    async def _leave(self, session: aiohttp.ClientSession) -> str:
        """Hang up soon after the request was sent, whether or not it is answered by then."""
        body = self._body(4) if self._random.random() < 0.5 else self._body_with_unknown_item()
        stay_s = self._random.uniform(0, LONGEST_STAY_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(stay_s), session.post(self._url, json=body) as response:
                await response.read()
        return "left"

    def _body_with_unknown_item(self) -> dict[str, Any]:
        """Return a request that is refused while its other pictures are being encoded."""
        body = chat.chat_body("What?", self._random.sample(self._pictures, 4), 4)
        unknown = {"type": "image_url", "image_url": None, "uuid": "unknown"}
        body["messages"][0]["content"].insert(self._random.randrange(5), unknown)
        return {**body, "cache_salt": f"{self._random.randrange(8)}"}

    def _body(self, num_tokens: int) -> dict[str, Any]:
        question = self._random.choice(QUESTIONS) + f" {self._random.randrange(10**6)}"
        if self._random.random() < PICTURE_PART:
            pictures = self._random.sample(self._pictures, self._random.randint(1, 2))
        else:
            pictures = []
        return chat.chat_body(question, pictures, num_tokens)

    def _side(self) -> int:
        return self._random.randrange(56, 140)
