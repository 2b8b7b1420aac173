"""Measure one request as its client sees it: times, tokens, how it ended."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from chiasm.common import metrics
from chiasm.common.errors import ChiasmError

if TYPE_CHECKING:
    import types
    from collections.abc import Callable
    from typing import Self

    from .chat_events import Usage

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _AnswerTimes:
    """When the tokens of one answer came, on the request's clock."""

    first_s: float
    last_s: float
    num_tokens: int


class RequestMetrics:
    """Follows one request; used as a context manager around all work on it.

    Times between tokens, and the most tokens, are those of each answer, as dashboards for vLLM
    expect; tokens and times of the request are those of all its answers together.
    """

    def __init__(
        self, model: str, request_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._request_id = request_id
        self._clock = clock
        self._start_s = clock()
        self._answers: dict[int, _AnswerTimes] = {}
        self._is_finished = False

    def __enter__(self) -> Self:
        metrics.GATEWAY_INFLIGHT_REQUESTS.inc()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        metrics.GATEWAY_INFLIGHT_REQUESTS.dec()
        if isinstance(error, ChiasmError):
            self._refuse(error)
        elif not self._is_finished and isinstance(error, GeneratorExit | asyncio.CancelledError):
            metrics.REQUEST_SUCCESS.labels(self._model, "abort").inc()
            log.info("request_cancelled", request_id=self._request_id, e2e_s=self._elapsed_s())

    def record_tokens(self, index: int, num_tokens: int) -> None:
        """Count tokens, at least one, that came together for answer ``index``."""
        now_s = self._clock()
        if not self._answers:
            seconds = now_s - self._start_s
            metrics.TIME_TO_FIRST_TOKEN_SECONDS.labels(self._model).observe(seconds)
        times = self._answers.get(index)
        if times is None:
            self._answers[index] = _AnswerTimes(now_s, now_s, num_tokens)
            return
        itl_s = (now_s - times.last_s) / num_tokens
        metrics.INTER_TOKEN_LATENCY_SECONDS.labels(self._model).observe(itl_s)
        times.last_s = now_s
        times.num_tokens += num_tokens

    def finish(self, finish_reason: str, usage: Usage, num_choices: int = 1) -> None:
        """Count a request that was answered; ``finish_reason`` is that of its last answer."""
        self._is_finished = True
        model = self._model
        most = max((times.num_tokens for times in self._answers.values()), default=0)
        metrics.REQUEST_SUCCESS.labels(model, finish_reason).inc()
        metrics.E2E_REQUEST_LATENCY_SECONDS.labels(model).observe(self._elapsed_s())
        metrics.REQUEST_PROMPT_TOKENS.labels(model).observe(usage.num_prompt_tokens)
        metrics.REQUEST_GENERATION_TOKENS.labels(model).observe(usage.num_output_tokens)
        metrics.REQUEST_MAX_NUM_GENERATION_TOKENS.labels(model).observe(most)
        metrics.REQUEST_PARAMS_N.labels(model).observe(num_choices)
        metrics.PROMPT_TOKENS.labels(model).inc(usage.num_prompt_tokens)
        metrics.GENERATION_TOKENS.labels(model).inc(usage.num_output_tokens)
        self._observe_time_per_token()
        log.info(
            "request_finished",
            request_id=self._request_id,
            finish_reason=finish_reason,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_media_tokens=usage.num_media_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_output_tokens=usage.num_output_tokens,
            ttft_s=self._ttft_s(),
            e2e_s=self._elapsed_s(),
        )

    def _refuse(self, error: ChiasmError) -> None:
        metrics.GATEWAY_ERRORS.labels(error.reason).inc()
        log.info(
            "request_failed",
            request_id=self._request_id,
            reason=error.reason,
            param=error.param,
            e2e_s=self._elapsed_s(),
        )

    def _observe_time_per_token(self) -> None:
        for times in self._answers.values():
            if times.num_tokens > 1:
                seconds = (times.last_s - times.first_s) / (times.num_tokens - 1)
                metrics.TIME_PER_OUTPUT_TOKEN_SECONDS.labels(self._model).observe(seconds)

    def _ttft_s(self) -> float | None:
        if not self._answers:
            return None
        # Answers are in the order of their first tokens.
        first = next(iter(self._answers.values()))
        return round(first.first_s - self._start_s, 6)

    def _elapsed_s(self) -> float:
        return round(self._clock() - self._start_s, 6)
