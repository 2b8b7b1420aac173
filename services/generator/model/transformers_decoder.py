"""Run the language model of any transformers checkpoint on our paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface

from chiasm.generator.model.attention import ATTENTION_NAME, AttentionContext, paged_attention
from chiasm.generator.model.model_spec import read_model_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import transformers

    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.kv_cache import KVCache
    from chiasm.generator.model.model_spec import LogitsRule, ModelSpec


class TransformersDecoder:
    """A half-loaded checkpoint whose attention layers read and write our cache.

    Every family works as transformers computes it: only the attention function is replaced.
    """

    def __init__(self, model: transformers.PreTrainedModel, cache: KVCache) -> None:
        """Wrap ``model``, the generator half of a checkpoint, on the device of ``cache``."""
        AttentionInterface.register(ATTENTION_NAME, paged_attention)
        self._text_model = model.get_decoder()  # type: ignore[no-untyped-call]  # transformers' own
        self._text_model.set_attn_implementation(ATTENTION_NAME)
        self._spec = read_model_spec(model)
        self._cache = cache
        self._embed = model.get_input_embeddings()
        self._head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # as above

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model."""
        return self._spec

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._cache.keys[0].device

    @property
    def block_size(self) -> int:
        """Tokens per block of its KV cache."""
        return self._cache.layout.block_size

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the tokens of ``batch``; see ``Decoder.forward``."""
        hidden = self._embed(batch.token_ids)
        deepstack: dict[str, object] = {}
        if batch.embeddings is not None:
            rows = batch.embeddings.to(hidden.dtype)
            spliced, *levels = torch.chunk(rows, 1 + self._spec.num_deepstack_levels, dim=1)
            hidden[batch.embedding_rows] = spliced
            deepstack = self._deepstack_arguments(batch, levels)
        positions = batch.positions[:, None] if len(batch.positions) > 1 else batch.positions
        output = self._text_model(
            inputs_embeds=hidden[None],
            position_ids=positions,
            use_cache=False,
            paged=AttentionContext(batch, self._cache),
            **deepstack,
        )
        last_hidden_state = output.last_hidden_state
        assert isinstance(last_hidden_state, torch.Tensor), "a decoder returns hidden states"
        return last_hidden_state[0]

    def _deepstack_arguments(
        self, batch: ForwardBatch, levels: Sequence[torch.Tensor]
    ) -> dict[str, object]:
        """Return the arguments by which a text model adds ``levels`` behind its first layers."""
        if not levels:
            return {}
        is_visual = torch.zeros_like(batch.token_ids, dtype=torch.bool)
        is_visual[batch.embedding_rows] = True
        return {"visual_pos_masks": is_visual[None], "deepstack_visual_embeds": list(levels)}

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the cache; see ``Decoder.copy_blocks``."""
        self._cache.copy_blocks(copies)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits as the model's own ``forward`` would post-process them."""
        logits = self._head(hidden)
        assert isinstance(logits, torch.Tensor), "a head returns logits"
        return apply_logits_rule(logits, self._spec.logits)


def apply_logits_rule(logits: torch.Tensor, rule: LogitsRule) -> torch.Tensor:
    """Scale and cap ``logits``, as families do behind their head."""
    if rule.scale != 1.0:
        logits = logits * rule.scale
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    return logits
