"""What every decoder does in front of its first layer and behind its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.model_spec import LogitsRule


def embed_batch(embed: torch.nn.Module, batch: ForwardBatch) -> torch.Tensor:
    """Return the token embeddings of ``batch`` with the rows of its media in their places.

    Returns:
        [num_tokens, hidden_size], dtype of the model, in new memory.
    """
    hidden = embed(batch.token_ids)
    assert isinstance(hidden, torch.Tensor), "an embedding returns rows"
    if batch.embeddings is not None:
        rows = batch.embeddings[:, : hidden.shape[1]]
        hidden[batch.embedding_rows] = rows.to(hidden.dtype)
    return hidden


def take_deepstack_levels(batch: ForwardBatch, num_levels: int) -> list[torch.Tensor]:
    """Return what is added to the media of ``batch`` behind each of the first layers.

    Returns:
        ``num_levels`` tensors [num_spliced, hidden_size], dtype of the embeddings; none if the
        batch has no media.
    """
    if batch.embeddings is None or not num_levels:
        return []
    return list(batch.embeddings.chunk(1 + num_levels, dim=1)[1:])


def position_ids_of(batch: ForwardBatch) -> torch.Tensor:
    """Return the positions of ``batch`` as transformers' text models take them.

    Returns:
        [1, num_tokens], or [3, 1, num_tokens] under M-RoPE; int64.
    """
    return batch.positions[:, None] if len(batch.positions) > 1 else batch.positions


def apply_logits_rule(logits: torch.Tensor, rule: LogitsRule) -> torch.Tensor:
    """Scale and cap ``logits``, as families do behind their head."""
    if rule.scale != 1.0:
        logits = logits * rule.scale
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    return logits
