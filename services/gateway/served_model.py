"""The model that the gateway serves: its name, its text side, its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.media import Modality

    from .checkpoint import SamplingDefaults
    from .media_policy import MediaPolicy
    from .prompt_builder import PromptBuilder
    from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What requests need of a checkpoint besides its weights.

    Attributes:
        name: Name in requests.
        tokenizer: The checkpoint's tokenizer.
        prompts: Builds prompts with the checkpoint's template.
        defaults: Sampling of requests that do not say.
        max_items: Most items of a modality in one prompt; absent: the limit on all items.
        media_policy: What the operator wishes for the processing of media.
        created_s: Start of serving, seconds since the Unix epoch.
    """

    name: str
    tokenizer: Tokenizer
    prompts: PromptBuilder
    defaults: SamplingDefaults
    max_items: Mapping[Modality, int]
    media_policy: MediaPolicy
    created_s: int

    def check_name(self, name: str) -> None:
        """Refuse a request for another model; an empty name means this one.

        Raises:
            NotFoundError: The name is another one.
        """
        if name and name != self.name:
            raise NotFoundError(
                f"The model `{name}` does not exist. Valid aliases: {self.name}.",
                reason="MODEL_NOT_FOUND",
                param="model",
            )


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What clients are told of a model; ``max_model_len`` is 0 while it is unknown."""

    name: str
    max_model_len: int
    modalities: tuple[Modality, ...]
    created_s: int
