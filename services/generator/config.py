"""Settings of the generator."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from chiasm.common.config import RedisUrl, ServiceSettings, SettingsGroup
from chiasm.generator.engine.chunking import Chunking

# Least step that keeps a CPU's matrix products efficient.
_FIXED_CHUNK_TOKENS = 256


class ModelSettings(SettingsGroup):
    """Which checkpoint, and how it is held."""

    model: Path = Field(description="Directory of the checkpoint, in the hub layout.")
    served_model_name: str = Field(
        default="", description="Name that clients ask for; empty takes the directory's name."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Element type of weights and KV cache; auto takes the checkpoint's.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model computes; auto takes a GPU if there is one."
    )
    decoder: Literal["auto", "fused", "transformers"] = Field(
        default="auto",
        description=(
            "Who computes the model: our own fused layers or transformers; auto takes the fused"
            " ones for every model type whose parity is tested."
        ),
    )
    quantization: Literal["none", "w8a8"] = Field(
        default="none",
        description=(
            "w8a8 multiplies by 8-bit integers in the linear layers of the fused decoder: about"
            " half the memory and 0.5 to 0.7 of the time, for a little accuracy; CPU only."
        ),
    )
    enforce_eager: bool = Field(
        default=False,
        description="Whether a GPU launches every kernel of every step; by default steps of up to"
        " 1,024 tokens are recorded at the start as CUDA graphs, and replayed.",
    )
    cpu_kernels: Literal["auto", "off", "plain", "avx2", "avx512", "amx"] = Field(
        default="auto",
        description=(
            "Instruction set of our compiled kernels on a CPU; auto takes the machine's best, and"
            " torch if that is plain or they were not compiled; off takes torch."
        ),
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Most tokens of prompt plus output; default: what model and cache allow.",
    )


class CacheSettings(SettingsGroup):
    """How much is kept in memory."""

    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens per KV-cache block.")
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Bytes of the KV cache; default: 1 GiB on a CPU, on a GPU what"
        " --gpu-memory-utilization leaves.",
    )
    gpu_memory_utilization: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Share of a GPU's memory that weights, KV cache, steps and other processes may"
        " take together when the generator starts; the rest is left to an encoder that starts"
        " later.",
    )
    num_blocks: int | None = Field(
        default=None, ge=1, description="Blocks of the KV cache; overrides --kv-cache-bytes."
    )
    enable_prefix_caching: bool = Field(
        default=True, description="Whether prompts that begin alike share their KV cache."
    )
    embedding_cache_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="Bytes of embeddings kept in host memory for later requests; 0: none.",
    )


class SchedulingSettings(SettingsGroup):
    """How much is computed and queued at once."""

    max_step_tokens: int = Field(default=2048, ge=1, description="Token budget of one step.")
    max_step_ms: int = Field(
        default=150,
        ge=0,
        description="Milliseconds to which prompts may lengthen a step beside streams, or twice the"
        " streams' own time if that is more; 0: no bound.",
    )
    max_running_sequences: int = Field(
        default=64, ge=1, description="Sequences that hold KV-cache blocks at once."
    )
    max_waiting_sequences: int = Field(
        default=1024, ge=1, description="Sequences without a first token; more are refused."
    )
    max_waiting_tokens: int = Field(
        default=1 << 20, ge=1, description="Prompt tokens of those sequences; more are refused."
    )
    max_embedding_bytes: int = Field(
        default=4 << 30,
        ge=1,
        description="Bytes of the embeddings of live sequences; more are refused.",
    )
    deterministic: bool = Field(
        default=False,
        description="Whether a request's tokens never depend on what it is computed with; slower.",
    )
    span_wait_s: float = Field(
        default=30.0, gt=0, description="Seconds that a sequence waits for its embeddings."
    )


class GeneratorSettings(ServiceSettings):
    """Settings of the generator service."""

    flag_aliases: ClassVar = {
        "max-num-seqs": "max_running_sequences",
        "max-num-batched-tokens": "max_step_tokens",
        "kv-cache-memory-bytes": "kv_cache_bytes",
        "num-gpu-blocks-override": "num_blocks",
    }
    refused_flags: ClassVar = {
        "trust-remote-code": "code from checkpoints is never run",
    }

    listen: str = Field(
        default="127.0.0.1:0", description="Address of the gRPC port; port 0: any free."
    )
    metrics_port: int | None = Field(
        default=None, description="Port of /metrics; default: none; 0: any."
    )
    service_token_file: Path = Field(description="File with the stack's service token.")
    store_secret_file: Path = Field(description="File with the secrets of the embedding store.")
    redis_url: RedisUrl = Field(
        default="",
        description="Redis that keeps embeddings; empty: they all come with the requests.",
    )
    store_ttl_s: float = Field(
        default=24 * 3600.0, gt=0, description="Seconds an embedding is kept after its last use."
    )
    store_timeout_s: float = Field(
        default=0.25, gt=0, description="Seconds Redis may take to answer before it is passed over."
    )
    core_page: Path | None = Field(
        default=None, description="File by which services of one host share its cores."
    )
    cores: int | None = Field(default=None, ge=1, description="Cores to use; default: all.")
    step_trace: Path | None = Field(
        default=None, description="File to which one JSON line per engine step is appended."
    )
    drain_s: float = Field(
        default=30.0, ge=0, description="Seconds that calls may go on after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    language_model: ModelSettings
    cache: CacheSettings = CacheSettings()
    scheduling: SchedulingSettings = SchedulingSettings()

    @model_validator(mode="after")
    def _check_step_fits_decode(self) -> Self:
        if self.scheduling.max_running_sequences > self.scheduling.max_step_tokens:
            raise ValueError("max_running_sequences must not be above max_step_tokens")
        return self

    @model_validator(mode="after")
    def _check_step_fits_fixed_chunk(self) -> Self:
        if self.scheduling.deterministic and self.chunking.fixed_tokens > (
            self.scheduling.max_step_tokens
        ):
            raise ValueError(
                "max_step_tokens must be at least"
                f" {self.chunking.fixed_tokens} in deterministic mode"
            )
        return self

    @property
    def chunking(self) -> Chunking:
        """Where prefills are cut."""
        size = self.cache.block_size
        most = max(size, _FIXED_CHUNK_TOKENS // size * size)
        return Chunking(most if self.scheduling.deterministic else 0)

    @property
    def model_name(self) -> str:
        """Served model name."""
        settings = self.language_model
        return settings.served_model_name or settings.model.resolve().name
