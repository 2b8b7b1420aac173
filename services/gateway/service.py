"""Wire and run the gateway."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import jinja2
import structlog
import uvloop

from chiasm.common.config import load_settings_or_exit
from chiasm.common.embedding_store import EmbeddingStore
from chiasm.common.grpc_client import EndpointPool
from chiasm.common.grpc_server import AddressInUseError, GrpcServer
from chiasm.common.guarded_redis import CallBudget
from chiasm.common.launch import keep_loaded
from chiasm.common.limits import Limits
from chiasm.common.logging import configure_logging
from chiasm.common.media_resolver import MediaResolver
from chiasm.common.metrics import MetricsPortError, start_metrics_server, watch_loop
from chiasm.common.secrets import StoreSecrets, StoreSecretsError
from chiasm.common.service_token import ServiceTokenError, load_service_token
from chiasm.v1 import chat_pb2_grpc

from .auth import ApiKeys, ApiKeysError
from .budgets import ByteBudget, RetryBudget
from .chat_service import ChatPipeline
from .chat_template import ChatTemplate
from .checkpoint import (
    CheckpointError,
    read_chat_template,
    read_sampling_defaults,
    read_special_tokens,
)
from .config import GatewaySettings
from .drain import Drain
from .encoder_client import EncoderClient
from .generator_client import GeneratorClient
from .media_library import MediaLibrary
from .prompt_builder import PromptBuilder
from .rest.app import Endpoints, create_app
from .rest.body import BodyReader
from .rest.chat import ChatEndpoint
from .rest.health import HealthEndpoint
from .rest.media import MediaEndpoint
from .rest.models import ModelsEndpoint
from .served_model import ServedModel
from .server import GatewayServer
from .servicer import ChatServicer
from .stack_info import StackInfo
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import PeerSettings

log = structlog.get_logger("chiasm.gateway")

_START_ERRORS = (
    AddressInUseError,
    ApiKeysError,
    CheckpointError,
    MetricsPortError,
    ServiceTokenError,
    StoreSecretsError,
    jinja2.TemplateSyntaxError,
    OSError,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = sys.argv[1:] if argv is None else argv
    settings = load_settings_or_exit(GatewaySettings, "gateway", arguments)
    configure_logging("gateway", settings.log_level)
    log.info("settings_resolved", **settings.log_fields())
    try:
        uvloop.run(serve(settings))
    except _START_ERRORS as error:
        log.error("gateway_not_started", reason=str(error))
        raise SystemExit(1) from None


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    watch_loop()
    server = build_server(settings)
    keep_loaded()
    await server.run(settings.listen)


def build_server(settings: GatewaySettings) -> GatewayServer:
    """Return the gateway with all its parts; needs a running event loop."""
    limits = Limits(max_body_bytes=settings.limits.max_body_bytes)
    token = load_service_token(settings.peers.service_token_file)
    encoders = EndpointPool(settings.peers.encoders, token, peer="encoder")
    generators = EndpointPool(settings.peers.generators, token, peer="generator")
    encoder = EncoderClient(encoders, RetryBudget())
    generator = GeneratorClient(generators, RetryBudget())
    secrets = StoreSecrets.load(settings.peers.store_secret_file)
    store = _connect_store(settings.peers, secrets)
    make_resolver = partial(MediaResolver, store, secrets) if store else None
    stack = StackInfo(encoder, generator, make_resolver)
    drain = Drain(settings.drain_s)
    model = _load_model(settings, limits)
    pipeline = ChatPipeline(
        model,
        stack,
        encoder,
        generator,
        ByteBudget(settings.limits.max_kept_source_bytes),
        drain,
    )
    ttl_s = (settings.peers.store_ttl_s, settings.limits.max_media_ttl_s)
    library = MediaLibrary(model, stack, encoder, store, ttl_s)
    keys = ApiKeys.load(
        [key.get_secret_value() for key in settings.api_key], settings.api_keys_file
    )
    timeout_s = settings.limits.request_timeout_s
    bodies = BodyReader(
        limits.max_body_bytes,
        settings.limits.body_timeout_s,
        ByteBudget(settings.limits.max_inflight_body_bytes),
    )
    endpoints = Endpoints(
        chat=ChatEndpoint(pipeline, keys, bodies, limits, timeout_s),
        models=ModelsEndpoint(pipeline, keys),
        media=MediaEndpoint(library, keys, bodies, limits, timeout_s),
        health=HealthEndpoint(stack),
    )
    grpc_server = GrpcServer(
        address=settings.grpc_listen,
        service_names=["chiasm.v1.ChatService"],
        token=None,
        max_message_bytes=limits.max_body_bytes,
    )
    chat_pb2_grpc.add_ChatServiceServicer_to_server(
        ChatServicer(pipeline, library, keys, limits, timeout_s), grpc_server.server
    )
    if settings.metrics_port is not None:
        start_metrics_server(settings.metrics_port, settings.listen)
    app = create_app(endpoints, limits)
    peers = (encoders, generator)
    return GatewayServer(app, grpc_server, peers, stack, store, drain)


def _connect_store(peers: PeerSettings, secrets: StoreSecrets) -> EmbeddingStore | None:
    if not peers.redis_url:
        return None
    budget = CallBudget.of(peers.store_timeout_s)
    return EmbeddingStore.connect(peers.redis_url, secrets, peers.store_ttl_s, budget)


def _load_model(settings: GatewaySettings, limits: Limits) -> ServedModel:
    model = settings.models
    tokenizer = Tokenizer.load(model.model)
    special_tokens = read_special_tokens(model.model)
    source = (
        model.chat_template.read_text(encoding="utf-8")
        if model.chat_template
        else read_chat_template(model.model)
    )
    template = ChatTemplate(source, special_tokens, limits.max_template_output_chars)
    prompts = PromptBuilder(
        tokenizer,
        template,
        bos_token=special_tokens.get("bos_token", ""),
        content_format=model.chat_template_content_format,
        trusts_special_tokens=model.trust_special_tokens,
    )
    return ServedModel(
        name=model.served_model_name or model.model.resolve().name,
        tokenizer=tokenizer,
        prompts=prompts,
        defaults=read_sampling_defaults(model.model),
        max_items=model.max_items,
        media_policy=model.media_policy,
        created_s=int(time.time()),
    )
