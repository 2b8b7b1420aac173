"""All metrics of the services, in base units and with bounded labels.

Names are ``chiasm_<service>_<what>_<unit>``; the ``vllm:*`` families keep the names and buckets
that existing dashboards know. A service fills only its own part; labelled families that it never
touches do not appear in its exposition.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram, start_http_server

if TYPE_CHECKING:
    from collections.abc import Callable

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STAGE_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
_LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_LAG_PAUSE_S = 0.02
_MODEL = ("model_name",)
_MODALITY = ("modality",)

# Gateway: what clients see.
TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "vllm:time_to_first_token_seconds",
    "Seconds from the arrival of a request to its first token.",
    _MODEL,
    buckets=_TTFT_BUCKETS,
)
INTER_TOKEN_LATENCY_SECONDS = Histogram(
    "vllm:inter_token_latency_seconds",
    "Seconds between two tokens of one answer.",
    _MODEL,
    buckets=_ITL_BUCKETS,
)
TIME_PER_OUTPUT_TOKEN_SECONDS = Histogram(
    "vllm:request_time_per_output_token_seconds",
    "Mean seconds per token after the first, one sample per answer.",
    _MODEL,
    buckets=_ITL_BUCKETS,
)
E2E_REQUEST_LATENCY_SECONDS = Histogram(
    "vllm:e2e_request_latency_seconds",
    "Seconds from the arrival of a request to its last token.",
    _MODEL,
    buckets=_LATENCY_BUCKETS,
)
REQUEST_PROMPT_TOKENS = Histogram(
    "vllm:request_prompt_tokens",
    "Prompt tokens of a request, media included.",
    _MODEL,
    buckets=_TOKEN_BUCKETS,
)
REQUEST_GENERATION_TOKENS = Histogram(
    "vllm:request_generation_tokens",
    "Generated tokens of a request.",
    _MODEL,
    buckets=_TOKEN_BUCKETS,
)
REQUEST_MAX_NUM_GENERATION_TOKENS = Histogram(
    "vllm:request_max_num_generation_tokens",
    "Most tokens that any answer of a request has.",
    _MODEL,
    buckets=_TOKEN_BUCKETS,
)
REQUEST_PARAMS_N = Histogram(
    "vllm:request_params_n",
    "Answers asked for by a request.",
    _MODEL,
    buckets=(1, 2, 5, 10, 20),
)
REQUEST_PARAMS_MAX_TOKENS = Histogram(
    "vllm:request_params_max_tokens",
    "Most tokens asked for by a request.",
    _MODEL,
    buckets=_TOKEN_BUCKETS,
)
PROMPT_TOKENS = Counter("vllm:prompt_tokens", "Prompt tokens of finished requests.", _MODEL)
GENERATION_TOKENS = Counter("vllm:generation_tokens", "Generated tokens.", _MODEL)
REQUEST_SUCCESS = Counter(
    "vllm:request_success", "Finished requests.", (*_MODEL, "finished_reason")
)
ADMISSION_REJECTIONS = Counter(
    "vllm:admission_rejections", "Requests refused before any work.", (*_MODEL, "reason")
)
HTTP_REQUESTS = Counter("http_requests", "HTTP requests by route.", ("method", "handler", "status"))
HTTP_REQUEST_DURATION_SECONDS = Histogram(
    "http_request_duration_seconds",
    "Seconds from the head of a request to the end of its response.",
    ("method", "handler"),
    buckets=_LATENCY_BUCKETS,
)
GATEWAY_INFLIGHT_REQUESTS = Gauge(
    "chiasm_gateway_inflight_requests", "Requests being worked on by the gateway."
)
GATEWAY_ERRORS = Counter("chiasm_gateway_errors", "Requests that ended with an error.", ("reason",))
GATEWAY_MEDIA_ITEMS = Counter(
    "chiasm_gateway_media_items",
    "Media items of requests by how their embedding came to be available.",
    (*_MODALITY, "cache"),
)

# Generator: the engine.
NUM_REQUESTS_RUNNING = Gauge("vllm:num_requests_running", "Sequences being computed.", _MODEL)
NUM_REQUESTS_WAITING = Gauge("vllm:num_requests_waiting", "Sequences waiting.", _MODEL)
KV_CACHE_USAGE_PERC = Gauge("vllm:kv_cache_usage_perc", "Part of the blocks in use, 0..1.", _MODEL)
NUM_PREEMPTIONS = Counter("vllm:num_preemptions", "Sequences preempted.", _MODEL)
PREFIX_CACHE_QUERIES = Counter(
    "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", _MODEL
)
PREFIX_CACHE_HITS = Counter(
    "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", _MODEL
)
ITERATION_TOKENS = Histogram(
    "vllm:iteration_tokens_total", "Tokens of one step.", _MODEL, buckets=_TOKEN_BUCKETS
)
REQUEST_QUEUE_TIME_SECONDS = Histogram(
    "vllm:request_queue_time_seconds",
    "Seconds a sequence waited for its first step.",
    _MODEL,
    buckets=_LATENCY_BUCKETS,
)
REQUEST_PREFILL_TIME_SECONDS = Histogram(
    "vllm:request_prefill_time_seconds",
    "Seconds from the first step of a sequence to its first token.",
    _MODEL,
    buckets=_LATENCY_BUCKETS,
)
REQUEST_DECODE_TIME_SECONDS = Histogram(
    "vllm:request_decode_time_seconds",
    "Seconds from the first token of a sequence to its last.",
    _MODEL,
    buckets=_LATENCY_BUCKETS,
)
GENERATOR_STEP_SECONDS = Histogram(
    "chiasm_generator_step_seconds", "Seconds of one engine step.", buckets=_STAGE_BUCKETS
)
GENERATOR_STEP_STAGE_SECONDS = Histogram(
    "chiasm_generator_step_stage_seconds",
    "Seconds of one stage of an engine step.",
    ["stage"],
    buckets=_STAGE_BUCKETS,
)
GENERATOR_STEP_SEQUENCES = Histogram(
    "chiasm_generator_step_sequences",
    "Sequences of one forward.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
GENERATOR_QUEUE_TOKENS = Gauge(
    "chiasm_generator_queue_tokens", "Prompt tokens of waiting sequences."
)
GENERATOR_BLOCKS_USED = Gauge("chiasm_generator_blocks_used", "KV-cache blocks in use.")
GENERATOR_BLOCKS = Gauge("chiasm_generator_blocks", "KV-cache blocks in all.")
GENERATOR_EMBEDDING_LOADS = Counter(
    "chiasm_generator_embedding_loads", "Embeddings loaded by where they came from.", ("source",)
)
GENERATOR_EMBEDDING_CACHE_LOOKUPS = Counter(
    "chiasm_generator_embedding_cache_lookups",
    "Embeddings looked up in host memory by result.",
    ("result",),
)
GENERATOR_EMBEDDING_CACHE_BYTES = Gauge(
    "chiasm_generator_embedding_cache_bytes", "Bytes of embeddings kept for later requests."
)
GENERATOR_SPAN_WAIT_SECONDS = Histogram(
    "chiasm_generator_span_wait_seconds",
    "Seconds a sequence could not go on because an embedding had not arrived.",
    buckets=_STAGE_BUCKETS,
)

# Encoder: the stages of one item. The `mm_` names are those proposed to vLLM.
MEDIA_DOWNLOAD_LATENCY_SECONDS = Histogram(
    "vllm:mm_media_download_latency_seconds",
    "Seconds to download one item.",
    _MODALITY,
    buckets=_STAGE_BUCKETS,
)
MEDIA_DOWNLOAD_BYTES = Counter(
    "vllm:mm_media_download_bytes", "Bytes of media downloaded.", _MODALITY
)
MEDIA_DECODE_LATENCY_SECONDS = Histogram(
    "vllm:mm_media_decode_latency_seconds",
    "Seconds to decode one item.",
    _MODALITY,
    buckets=_STAGE_BUCKETS,
)
PREPROCESSING_LATENCY_SECONDS = Histogram(
    "vllm:mm_preprocessing_total_latency_seconds",
    "Seconds to preprocess one item.",
    _MODALITY,
    buckets=_STAGE_BUCKETS,
)
ENCODER_FORWARD_SECONDS = Histogram(
    "chiasm_encoder_forward_seconds", "Seconds of one tower forward.", buckets=_STAGE_BUCKETS
)
ENCODER_BATCH_ITEMS = Histogram(
    "chiasm_encoder_batch_items", "Items of one tower forward.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
ENCODER_ENCODED_ITEMS = Counter(
    "chiasm_encoder_encoded_items", "Items that went through the tower.", _MODALITY
)
ENCODER_QUEUE_PIXELS = Gauge("chiasm_encoder_queue_pixels", "Pixels admitted and not yet encoded.")
ENCODER_REJECTED_ITEMS = Counter(
    "chiasm_encoder_rejected_items", "Items refused or failed.", (*_MODALITY, "reason")
)
ENCODER_WORKER_DEATHS = Counter(
    "chiasm_encoder_worker_deaths", "Decode workers that died or were killed.", ("reason",)
)
MM_CACHE_QUERIES = Counter("vllm:mm_cache_queries", "Media items looked up in the store.", _MODEL)
MM_CACHE_HITS = Counter("vllm:mm_cache_hits", "Media items found in the store.", _MODEL)

# Embedding store, in whichever service calls it.
STORE_SECONDS = Histogram(
    "chiasm_store_seconds", "Seconds of one store call.", ("operation",), buckets=_STAGE_BUCKETS
)
STORE_BYTES = Counter("chiasm_store_bytes", "Bytes moved to or from the store.", ("operation",))
STORE_LOOKUPS = Counter("chiasm_store_lookups", "Store lookups by result.", ("result",))
STORE_BAD_ENTRIES = Counter(
    "chiasm_store_bad_entries", "Entries that failed a check and were deleted.", ("reason",)
)
STORE_BYPASSES = Counter(
    "chiasm_store_bypasses", "Store calls given up or skipped because it does not answer.", ("why",)
)
STORE_SHARE_FORGOTTEN = Counter(
    "chiasm_store_share_forgotten",
    "Embeddings forgotten because their tenant wrote more than its share of the store.",
)
STORE_FLIGHTS = Counter(
    "chiasm_store_flights", "Missing embeddings by who encoded them.", ("leader",)
)

# Every service.
PROCESS_TASKS = Gauge("chiasm_process_tasks", "Tasks of the event loop that have not ended.")
PROCESS_LOOP_LAG_SECONDS = Histogram(
    "chiasm_process_loop_lag_seconds",
    "Seconds by which the event loop was late for a timer, looked at 50 times a second.",
    buckets=_LAG_BUCKETS,
)


class MetricsPortError(Exception):
    """The port of the metrics cannot be listened on; the text says why."""


def watch_loop() -> None:
    """Count the tasks of the running event loop, and time how late it is, from now on."""
    loop = asyncio.get_running_loop()
    PROCESS_TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))

    def look(due: float) -> None:
        now = loop.time()
        PROCESS_LOOP_LAG_SECONDS.observe(max(0.0, now - due))
        loop.call_at(now + _LAG_PAUSE_S, look, now + _LAG_PAUSE_S)

    look(loop.time())


def start_metrics_server(port: int, listen: str) -> Callable[[], None]:
    """Serve ``/metrics`` from a thread, on the same host as the service itself.

    Args:
        port: Port to listen on; 0 lets the system choose.
        listen: ``host:port`` of the service; only the host counts.

    Returns:
        A function that stops the server.

    Raises:
        MetricsPortError: The port cannot be listened on.
    """
    host = listen.rpartition(":")[0].strip("[]")
    try:
        server, thread = start_http_server(port, addr=host)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MetricsPortError(
            f"The metrics port {port} of {host} cannot be listened on: {reason}."
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
