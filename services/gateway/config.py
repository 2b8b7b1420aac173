"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from chiasm.common.config import RedisUrl, ServiceSettings, SettingsGroup
from chiasm.common.convert import modality_to_proto, options_from_proto
from chiasm.common.errors import InvalidRequestError
from chiasm.common.limits import MAX_MEDIA_TTL_S
from chiasm.common.media import Modality

from .content_format import ContentFormat
from .media_policy import MediaPolicy
from .rest.options_json import RequestOptions

_MIB = 1 << 20

ItemLimits = dict[str, int | dict[str, int]]
MediaValue = int | float | list[int] | None
ProcessorKwargs = dict[str, MediaValue | dict[str, MediaValue]]
MediaIoKwargs = dict[str, dict[str, MediaValue]]


class ModelSettings(SettingsGroup):
    """The model and its text side."""

    model: Path = Field(description="Folder of the checkpoint; weights are not read.")
    served_model_name: str = Field(
        "", description="Name of the model in requests; empty: the checkpoint folder's name."
    )
    chat_template: Path | None = Field(
        None, description="Jinja file that replaces the checkpoint's chat template."
    )
    chat_template_content_format: ContentFormat = Field(
        ContentFormat.AUTO,
        description="What the template takes as content: auto, openai (parts) or string.",
    )
    limit_mm_per_prompt: ItemLimits = Field(
        default_factory=dict,
        description='Most media items per prompt, such as image=5,video=1 or {"image": 5}.',
    )
    mm_processor_kwargs: ProcessorKwargs = Field(
        default_factory=dict,
        description="Processing of media, such as max_pixels=400000; max_pixels, fps and num_frames"
        " are limits that requests may lower.",
    )
    media_io_kwargs: MediaIoKwargs = Field(
        default_factory=dict,
        description='Decoding of media by modality, such as {"video": {"num_frames": 16},'
        ' "image": {"rgba_background_color": [0, 0, 0]}}.',
    )
    enable_mm_embeds: bool = Field(
        True, description="Take ready-made embeddings (image_embeds and the like) in requests."
    )
    trust_special_tokens: bool = Field(
        False, description="Let spellings of special tokens in messages become special tokens."
    )

    @field_validator("limit_mm_per_prompt")
    @classmethod
    def _check_limits(
        cls, value: dict[str, int | dict[str, int]]
    ) -> dict[str, int | dict[str, int]]:
        known = {modality.value for modality in Modality}
        for name, limit in value.items():
            count = limit.get("count", 0) if isinstance(limit, dict) else limit
            if name not in known or count < 0:
                raise ValueError(f"must give {', '.join(sorted(known))} a count of at least 0")
        return value

    @model_validator(mode="after")
    def _check_kwargs(self) -> Self:
        try:
            options = RequestOptions(self.mm_processor_kwargs, self.media_io_kwargs)
        except InvalidRequestError as error:
            raise ValueError(f"{error.param}: {error.message}") from error
        if options.ignored:
            raise ValueError(f"{options.ignored[0]} is not known")
        return self

    @property
    def media_policy(self) -> MediaPolicy:
        """What requests may wish for the processing of their media."""
        options = RequestOptions(self.mm_processor_kwargs, self.media_io_kwargs)
        return MediaPolicy(
            {
                modality: options_from_proto(options.of(modality_to_proto(modality)))
                for modality in Modality
            },
            takes_embeddings=self.enable_mm_embeds,
        )

    @property
    def max_items(self) -> dict[Modality, int]:
        """Most items of each modality that ``limit_mm_per_prompt`` names."""
        counts = {
            name: limit.get("count") if isinstance(limit, dict) else limit
            for name, limit in self.limit_mm_per_prompt.items()
        }
        return {Modality(name): count for name, count in counts.items() if count is not None}


class PeerSettings(SettingsGroup):
    """The other services and what is shared with them."""

    encoders: str = Field(
        "127.0.0.1:8021", description="Encoders: host:port names, separated by commas."
    )
    generators: str = Field(
        "127.0.0.1:8031", description="Generators: host:port names, separated by commas."
    )
    service_token_file: Path = Field(
        description="File with the token that internal ports ask for; mode 0600."
    )
    store_secret_file: Path = Field(
        description="File with the secret that embedding ids are made with; mode 0600."
    )
    redis_url: RedisUrl = Field(
        "", description="Redis of the embedding store; empty: look nothing up before encoding."
    )
    store_ttl_s: float = Field(
        24 * 3600.0, gt=0, description="Seconds an embedding is kept after its last use."
    )
    store_timeout_s: float = Field(
        0.25, gt=0, description="Seconds Redis may take to answer before it is passed over."
    )


class LimitSettings(SettingsGroup):
    """Bounds on requests."""

    request_timeout_s: float = Field(
        600.0, gt=0, description="Most seconds from the arrival of a request to its last token."
    )
    body_timeout_s: float = Field(
        60.0, gt=0, description="Most seconds for a request's body to arrive."
    )
    max_body_bytes: int = Field(64 * _MIB, gt=0, description="Most bytes of one request.")
    max_inflight_body_bytes: int = Field(
        512 * _MIB, gt=0, description="Most bytes of all request bodies being read or encoded."
    )
    max_kept_source_bytes: int = Field(
        512 * _MIB,
        ge=0,
        description="Most bytes of media kept until their request's prefill has ended.",
    )
    max_media_ttl_s: float = Field(
        7 * 24 * 3600.0,
        ge=1,
        le=MAX_MEDIA_TTL_S,
        description="Most seconds a media object is kept after its last use if it asks for more.",
    )


class GatewaySettings(ServiceSettings):
    """Serve the OpenAI REST API and ChatService."""

    env_aliases: ClassVar[dict[str, str]] = {"VLLM_API_KEY": "api_key"}

    listen: str = Field("127.0.0.1:8000", description="host:port of the REST API.")
    grpc_listen: str = Field("127.0.0.1:8001", description="host:port of ChatService.")
    api_key: tuple[SecretStr, ...] = Field(
        (), description="Keys that open /v1 and ChatService; none: everyone may call."
    )
    api_keys_file: Path | None = Field(
        None, description="File with one 'TENANT KEY' per line; keys of --api-key are 'default'."
    )
    log_level: str = Field("info", description="Least severe level logged: debug to error.")
    metrics_port: int | None = Field(
        None, description="Port that serves /metrics besides the REST API; default: none."
    )
    core_page: Path | None = Field(
        None, description="Shared core page of the host; the gateway takes no cores itself."
    )
    drain_s: float = Field(30.0, ge=0, description="Seconds for running requests when stopping.")
    models: ModelSettings
    peers: PeerSettings
    limits: LimitSettings = LimitSettings()
