"""Settings of the encoder."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from chiasm.common.config import RedisUrl, ServiceSettings, SettingsGroup
from chiasm.common.cores import count_cores
from chiasm.encoder.wire_video import MAX_SAMPLED_FRAMES

_MIB = 1 << 20


class ModelSettings(SettingsGroup):
    """Which checkpoint, and how its tower runs."""

    model: Path = Field(description="Directory of the checkpoint, in the hub layout.")
    served_model_name: str = Field(
        "", description="Name that clients ask for; empty takes the directory's name."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Element type of weights and embeddings; auto: the checkpoint's."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the tower runs; auto takes a GPU if there is one."
    )
    tower: Literal["auto", "fused", "transformers"] = Field(
        "auto",
        description=(
            "Who computes the tower: our own fused layers or transformers; auto takes the fused"
            " ones for every model type whose parity is tested."
        ),
    )
    cpu_kernels: Literal["auto", "off", "plain", "avx2", "avx512", "amx"] = Field(
        "auto",
        description=(
            "Instruction set of our compiled kernels in the fused tower on a CPU; auto takes the"
            " machine's best, torch if that is plain or they were not compiled; off takes torch."
        ),
    )
    tower_quantization: Literal["none", "w8a8"] = Field(
        "none",
        description=(
            "w8a8 multiplies by 8-bit integers in the blocks of the fused tower: less time and"
            " half the memory, for a little accuracy; CPU only."
        ),
    )
    max_batch_items: int | None = Field(
        None, ge=1, description="Most items of one forward; default: 1 on a CPU, 16 on a GPU."
    )
    max_batch_pixels: int = Field(
        4_000_000, ge=1, description="Most pixels of one forward of several items, after resizing."
    )


class FetchSettings(SettingsGroup):
    """Which URLs are fetched, and for how long."""

    allowed_media_domains: tuple[str, ...] = Field(
        (), description="Host names that media URLs may name; empty allows every public host."
    )
    allow_private_media: tuple[str, ...] = Field(
        (), description="Networks (CIDR) that may be dialled although they are not public."
    )
    allowed_local_media_path: Path | None = Field(
        None, description="Folder below which file URLs are read; default: no file is."
    )
    media_redirects: int = Field(3, ge=0, le=10, description="Redirects followed per URL.")
    image_fetch_timeout_s: float = Field(
        5.0, gt=0, description="Seconds from the start of a fetch to the last byte of an image."
    )
    audio_fetch_timeout_s: float = Field(10.0, gt=0, description="The same for a sound clip.")
    video_fetch_timeout_s: float = Field(30.0, gt=0, description="The same for a video.")

    @field_validator("allow_private_media")
    @classmethod
    def _check_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks

    @field_validator("allowed_local_media_path")
    @classmethod
    def _check_folder(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError("there is no such folder")
        return path

    @field_validator("allowed_media_domains")
    @classmethod
    def _lower(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(domain.lower() for domain in domains)


class DecodeSettings(SettingsGroup):
    """What decoding may take."""

    decode_workers: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Processes that decode media; default: half as many as cores, 2 to 16.",
    )
    decode_memory_bytes: int = Field(
        1536 * _MIB, ge=256 * _MIB, description="Address space of one decode process."
    )
    decode_cpu_s: int = Field(10, ge=1, description="CPU seconds of one decode.")
    video_decode_cpu_s: int = Field(25, ge=1, description="CPU seconds of one decode of a video.")
    decode_timeout_s: float = Field(60.0, gt=0, description="Seconds of one decode on the clock.")
    max_image_pixels: int = Field(
        33_000_000, ge=1, description="Most pixels of an image, by its header, or of a frame."
    )
    max_video_frames: int = Field(
        768, ge=1, le=MAX_SAMPLED_FRAMES, description="Most frames of a video that are looked at."
    )
    max_video_pixels: int = Field(
        256_000_000,
        ge=1,
        description="Most pixels of these together; fewer frames are taken of larger ones.",
    )
    max_video_source_frames: int = Field(
        250_000, ge=1, description="Most frames that a video may hold."
    )
    max_video_duration_s: float = Field(
        3600.0, gt=0, description="Longest that a video may run, in seconds."
    )
    max_audio_duration_s: int = Field(600, ge=1, description="Most seconds of a sound clip.")


class AdmissionSettings(SettingsGroup):
    """How much may be in the encoder at one time; more is refused at once."""

    max_items: int = Field(512, ge=1, description="Media items in the encoder.")
    max_queue_source_bytes: int = Field(
        1024 * _MIB, ge=1, description="Bytes of their sources together."
    )
    max_queue_pixels: int = Field(
        2_000_000_000, ge=1, description="Pixels of the items together, by their headers."
    )
    max_wait_s: float = Field(
        25.0, gt=0, description="Seconds that the queued items may take; below span_wait_s."
    )
    max_items_in_work: int = Field(
        4, ge=1, description="Items that are decoded, preprocessed or encoded at one time."
    )
    preprocess_threads: int | None = Field(
        None, ge=1, description="Threads that preprocess; default: one for four cores, 1 to 8."
    )


class EncoderSettings(ServiceSettings):
    """Settings of the encoder service."""

    flag_aliases: ClassVar = {}
    env_aliases: ClassVar = {
        "VLLM_AUDIO_FETCH_TIMEOUT": "audio_fetch_timeout_s",
        "VLLM_IMAGE_FETCH_TIMEOUT": "image_fetch_timeout_s",
        "VLLM_MAX_AUDIO_DECODE_DURATION_S": "max_audio_duration_s",
        "VLLM_MAX_IMAGE_PIXELS": "max_image_pixels",
        "VLLM_VIDEO_FETCH_TIMEOUT": "video_fetch_timeout_s",
    }
    env_off_switches: ClassVar = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": ("media_redirects", "0")}
    refused_flags: ClassVar = {
        "trust-remote-code": "code from checkpoints is never run",
    }

    listen: str = Field("127.0.0.1:0", description="Address of the gRPC port; port 0: any free.")
    metrics_port: int | None = Field(None, description="Port of /metrics; default: none; 0: any.")
    service_token_file: Path = Field(description="File with the stack's service token.")
    store_secret_file: Path = Field(description="File with the secrets of the embedding store.")
    redis_url: RedisUrl = Field(min_length=1, description="Redis that keeps embeddings.")
    store_ttl_s: float = Field(
        24 * 3600.0, gt=0, description="Seconds an embedding is kept after its last use."
    )
    store_timeout_s: float = Field(
        0.25, gt=0, description="Seconds Redis may take to answer before it is passed over."
    )
    store_tenant_bytes: int | None = Field(
        None,
        ge=16 * _MIB,
        description=(
            "Bytes of embeddings that one tenant may have in Redis, the same for all encoders; for"
            " more, its own oldest make room. Default: one tenant may fill Redis."
        ),
    )
    core_page: Path | None = Field(
        None, description="File by which services of one host share its cores."
    )
    cores: int | None = Field(None, ge=1, description="Cores to use; default: all.")
    drain_s: float = Field(30.0, ge=0, description="Seconds that calls may go on after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )
    tower: ModelSettings
    fetch: FetchSettings = FetchSettings()
    decode: DecodeSettings = DecodeSettings()
    admission: AdmissionSettings = AdmissionSettings()

    @model_validator(mode="after")
    def _check_one_item_fits(self) -> Self:
        for name in ("max_image_pixels", "max_video_pixels"):
            if self.admission.max_queue_pixels < getattr(self.decode, name):
                raise ValueError(f"max_queue_pixels must not be below {name}")
        return self

    @property
    def num_decode_workers(self) -> int:
        """Processes that decode media."""
        num_cores = self.cores or count_cores()
        return self.decode.decode_workers or max(2, min(16, num_cores // 2))

    @property
    def num_preprocess_threads(self) -> int:
        """Threads that preprocess; each computes with one core."""
        num_cores = self.cores or count_cores()
        return self.admission.preprocess_threads or max(1, min(8, num_cores // 4))

    @property
    def model_name(self) -> str:
        """Served model name."""
        return self.tower.served_model_name or self.tower.model.resolve().name
