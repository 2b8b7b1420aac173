"""Measure one request as its client sees it: times, tokens, how it ended."""

from __future__ import annotations

import asyncio
import time
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


class RequestMetrics:
    """Follows one request; used as a context manager around all work on it."""

    def __init__(
        self, model: str, request_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._request_id = request_id
        self._clock = clock
        self._start_s = clock()
        self._first_token_s: float | None = None
        self._last_token_s = self._start_s
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

    def record_tokens(self, num_tokens: int) -> None:
        """Count the tokens of one step."""
        now_s = self._clock()
        if self._first_token_s is None:
            self._first_token_s = now_s
            seconds = now_s - self._start_s
            metrics.TIME_TO_FIRST_TOKEN_SECONDS.labels(self._model).observe(seconds)
        else:
            itl_s = (now_s - self._last_token_s) / max(num_tokens, 1)
            metrics.INTER_TOKEN_LATENCY_SECONDS.labels(self._model).observe(itl_s)
        self._last_token_s = now_s

    def finish(self, finish_reason: str, usage: Usage, num_choices: int = 1) -> None:
        """Count a request that was answered; ``finish_reason`` is that of its last answer."""
        self._is_finished = True
        model = self._model
        metrics.REQUEST_SUCCESS.labels(model, finish_reason).inc()
        metrics.E2E_REQUEST_LATENCY_SECONDS.labels(model).observe(self._elapsed_s())
        metrics.REQUEST_PROMPT_TOKENS.labels(model).observe(usage.num_prompt_tokens)
        metrics.REQUEST_GENERATION_TOKENS.labels(model).observe(usage.num_output_tokens)
        metrics.REQUEST_MAX_NUM_GENERATION_TOKENS.labels(model).observe(usage.num_output_tokens)
        metrics.REQUEST_PARAMS_N.labels(model).observe(num_choices)
        metrics.PROMPT_TOKENS.labels(model).inc(usage.num_prompt_tokens)
        metrics.GENERATION_TOKENS.labels(model).inc(usage.num_output_tokens)
        self._observe_time_per_token(usage.num_output_tokens)
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

    def _observe_time_per_token(self, num_tokens: int) -> None:
        if self._first_token_s is not None and num_tokens > 1:
            seconds = (self._last_token_s - self._first_token_s) / (num_tokens - 1)
            metrics.TIME_PER_OUTPUT_TOKEN_SECONDS.labels(self._model).observe(seconds)

    def _ttft_s(self) -> float | None:
        if self._first_token_s is None:
            return None
        return round(self._first_token_s - self._start_s, 6)

    def _elapsed_s(self) -> float:
        return round(self._clock() - self._start_s, 6)
