"""Run the language model of any transformers checkpoint on our paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface

from chiasm.common.compute_threads import call_before_layers
from chiasm.generator.model.attention import ATTENTION_NAME, AttentionContext, paged_attention
from chiasm.generator.model.layer_probe import check_layers
from chiasm.generator.model.model_spec import read_model_spec
from chiasm.generator.model.text_model_io import (
    apply_logits_rule,
    embed_batch,
    position_ids_of,
    take_deepstack_levels,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import transformers

    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.kv_cache import KVCache
    from chiasm.generator.model.model_spec import ModelSpec


class TransformersDecoder:
    """A half-loaded checkpoint whose attention layers read and write our cache.

    Every family works as transformers computes it: only the attention function is replaced.
    """

    def __init__(self, model: transformers.PreTrainedModel, cache: KVCache) -> None:
        """Wrap ``model``, the generator half of a checkpoint, on the device of ``cache``.

        Raises:
            UnsupportedModelError: A layer does not attend as our attention function can.
        """
        AttentionInterface.register(ATTENTION_NAME, paged_attention)
        self._spec = read_model_spec(model)
        self._text_model = model.get_decoder()  # type: ignore[no-untyped-call]  # transformers' own
        check_layers(self._text_model, self._spec)
        self._text_model.set_attn_implementation(ATTENTION_NAME)
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

    @property
    def gathers_contexts(self) -> bool:
        """Whether torch attends; see ``Decoder.gathers_contexts``."""
        return self._cache.kernels is None

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the tokens of ``batch``; see ``Decoder.forward``."""
        levels = take_deepstack_levels(batch, self._spec.num_deepstack_levels)
        output = self._text_model(
            inputs_embeds=embed_batch(self._embed, batch)[None],
            position_ids=position_ids_of(batch),
            use_cache=False,
            paged=AttentionContext(batch, self._cache),
            **_deepstack_arguments(batch, levels),
        )
        last_hidden_state = output.last_hidden_state
        assert isinstance(last_hidden_state, torch.Tensor), "a decoder returns hidden states"
        return last_hidden_state[0]

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called before each layer; see ``Decoder.call_before_layers``."""
        call_before_layers(self._text_model, callback)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks of the cache; see ``Decoder.copy_blocks``."""
        self._cache.copy_blocks(copies)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits as the model's own ``forward`` would post-process them."""
        logits = self._head(hidden)
        assert isinstance(logits, torch.Tensor), "a head returns logits"
        return apply_logits_rule(logits, self._spec.logits)


def _deepstack_arguments(batch: ForwardBatch, levels: Sequence[torch.Tensor]) -> dict[str, object]:
    """Return the arguments by which a text model adds ``levels`` behind its first layers."""
    if not levels:
        return {}
    is_visual = torch.zeros_like(batch.token_ids, dtype=torch.bool)
    is_visual[batch.embedding_rows] = True
    return {"visual_pos_masks": is_visual[None], "deepstack_visual_embeds": levels}
