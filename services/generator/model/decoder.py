"""The interface of a language model, whoever computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.model_spec import ModelSpec


class Decoder(Protocol):
    """A language model with its KV cache."""

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per block of its KV cache."""
        ...

    @property
    def gathers_contexts(self) -> bool:
        """Whether contexts are copied out of the cache, so that similar lengths go together."""
        ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the tokens of ``batch`` and write their keys and values into the cache.

        Returns:
            Last hidden states, until the next forward. [num_tokens, hidden_size], dtype of the
            model.
        """
        ...

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called in a forward before each layer."""
        ...

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy keys and values between blocks of the cache."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states. [num_rows, vocab_size]."""
        ...
