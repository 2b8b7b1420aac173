"""Compute the Llama class of language models on our paged KV cache, with fused weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from chiasm.common.rms_norm import RMSNorm
from chiasm.generator.model.attention import AttentionContext
from chiasm.generator.model.fused.decoder_layer import DecoderLayer
from chiasm.generator.model.fused.description import UnsupportedDecoderError, describe_decoder
from chiasm.generator.model.fused.gpu_operators import GpuOperators
from chiasm.generator.model.fused.kernel_operators import KernelOperators
from chiasm.generator.model.fused.layer_weights import check_layers, take_layer, take_norm_weight
from chiasm.generator.model.fused.linear_maker import LinearMaker
from chiasm.generator.model.fused.rotary import has_fixed_angles, make_rotation
from chiasm.generator.model.fused.torch_operators import TorchOperators
from chiasm.generator.model.model_spec import read_model_spec
from chiasm.generator.model.text_model_io import (
    apply_logits_rule,
    embed_batch,
    position_ids_of,
    take_deepstack_levels,
)
from chiasm.kernels.cpu.native import CpuKernels
from chiasm.kernels.layer_kernels import LayerKernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import transformers

    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.fused.layer_operators import LayerOperators
    from chiasm.generator.model.fused.rotary import Rotation
    from chiasm.generator.model.kv_cache import KVCache
    from chiasm.generator.model.model_spec import ModelSpec
    from chiasm.kernels.cpu.quantized_layer import Quantization

# Rows of a step that are sampled from.
_TYPICAL_HEAD_ROWS = 16


class FusedDecoder:
    """A half-loaded checkpoint of a described kind, computed by ourselves.

    Weights that read the same input are one matrix, and matrices are packed for the CPU. Token
    embedding and rotary frequencies stay transformers' own modules.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        cache: KVCache,
        quantization: Quantization = "none",
    ) -> None:
        """Take the weights of ``model``, the generator half of a checkpoint.

        One layer at a time, so that never more than one is held twice.

        Args:
            model: Half-loaded model on the device of ``cache``; unusable afterwards.
            cache: Where keys and values are kept.
            quantization: ``w8a8`` multiplies by 8-bit integers in all linear layers.

        Raises:
            UnsupportedDecoderError: The model is of another kind, or the device has no such
                products; it is unchanged and usable.
        """
        maker = LinearMaker(cache, quantization)
        text_model = model.get_decoder()  # type: ignore[no-untyped-call]  # transformers' own
        self._description = describe_decoder(model.config.get_text_config())
        check_layers(text_model.layers, self._description)
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # as above
        if type(head) is not torch.nn.Linear:
            raise UnsupportedDecoderError("the head is not a plain linear layer")
        self._spec = read_model_spec(model)
        self._cache = cache
        self._embed = model.get_input_embeddings()
        self._rotary = text_model.rotary_emb
        operators = self._make_operators()
        self._layers = [
            DecoderLayer(
                index,
                self._description,
                take_layer(layer, self._description, maker, operators.gate),
                operators,
            )
            for index, layer in enumerate(text_model.layers)
        ]
        norm_weight = take_norm_weight(text_model.norm, self._description)
        self._norm = RMSNorm(norm_weight, self._description.norm_epsilon)
        self._last_norm = operators.add_norm(self._norm, self._description.residual_scale)
        # The weight of a tied head stays with the embedding.
        self._head = maker.linear(head.weight.detach(), head.bias, _TYPICAL_HEAD_ROWS)
        del head.weight
        self._before_layer: Callable[[], None] = lambda: None

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model."""
        return self._spec

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._cache.keys[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and cache."""
        return self._cache.keys[0].dtype

    @property
    def block_size(self) -> int:
        """Tokens per block of its KV cache."""
        return self._cache.layout.block_size

    @property
    def gathers_contexts(self) -> bool:
        """Whether torch attends; see ``Decoder.gathers_contexts``."""
        return self._cache.kernels is None

    @property
    def is_replayable(self) -> bool:
        """Whether what a forward launches depends on nothing but the shapes of the batch.

        It takes padding, too: negative slots, of which nothing is kept, and empty contexts.
        """
        return isinstance(self._cache.kernels, LayerKernels) and has_fixed_angles(self._rotary)

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of all weights that it holds."""
        embedding = sum(parameter.nbytes for parameter in self._embed.parameters())
        layers = sum(layer.num_bytes for layer in self._layers)
        return embedding + layers + self._norm.num_bytes + self._head.num_bytes

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute the tokens of ``batch``; see ``Decoder.forward``."""
        hidden = self.embed(batch) if batch.hidden is None else batch.hidden
        context = AttentionContext(batch, self._cache)
        rotations = self._make_rotations(hidden, batch)
        levels = take_deepstack_levels(batch, self._spec.num_deepstack_levels)
        addend = None
        for index, layer in enumerate(self._layers):
            self._before_layer()
            addend = layer.forward(hidden, addend, rotations[layer.rotary_type], context)
            if index < len(levels):
                hidden.add_(addend, alpha=self._description.residual_scale)
                hidden[batch.embedding_rows] += levels[index].to(hidden.dtype)
                addend = None
        return self._last_norm(hidden, addend)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Return what enters the first layer for the tokens and media of ``batch``.

        Returns:
            [num_tokens, hidden_size], dtype of the model, in new memory.
        """
        hidden = embed_batch(self._embed, batch)
        if self._description.embedding_scale != 1.0:
            hidden = hidden * self._description.embedding_scale
        return hidden

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called before each layer; see ``Decoder.call_before_layers``."""
        self._before_layer = callback

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks of the cache; see ``Decoder.copy_blocks``."""
        self._cache.copy_blocks(copies)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits as the model's own ``forward`` would post-process them."""
        return apply_logits_rule(self._head(hidden), self._spec.logits)

    def _make_operators(self) -> LayerOperators:
        kernels = self._cache.kernels
        if isinstance(kernels, CpuKernels):
            return KernelOperators(self._description, self._cache, kernels)
        if isinstance(kernels, LayerKernels):
            return GpuOperators(self._description, self._cache, kernels)
        return TorchOperators(self._description, self._cache)

    def _make_rotations(self, hidden: torch.Tensor, batch: ForwardBatch) -> dict[str, Rotation]:
        """Return the angles of the batch's tokens by rotary type."""
        position_ids = position_ids_of(batch)
        rotations = {}
        for rotary_type in self._description.rotary_types:
            options = {"layer_type": rotary_type} if rotary_type else {}
            angles = self._rotary(hidden[None], position_ids, **options)
            cos, sin = cast("tuple[torch.Tensor, torch.Tensor]", angles)
            rotations[rotary_type] = make_rotation(cos, sin)
        return rotations
