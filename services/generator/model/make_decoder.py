"""Choose who computes a language model: our fused decoder, or transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import structlog

from chiasm.generator.model.fused.description import UnsupportedDecoderError
from chiasm.generator.model.fused.fused_decoder import FusedDecoder
from chiasm.generator.model.transformers_decoder import TransformersDecoder

if TYPE_CHECKING:
    import transformers

    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.kv_cache import KVCache
    from chiasm.kernels.cpu.quantized_layer import Quantization

DecoderChoice = Literal["auto", "fused", "transformers"]

log = structlog.get_logger("chiasm.generator")


def make_decoder(
    choice: DecoderChoice,
    model: transformers.PreTrainedModel,
    cache: KVCache,
    quantization: Quantization = "none",
) -> Decoder:
    """Return a decoder of ``model`` on ``cache`` and log which one, and why.

    Args:
        choice: ``auto`` takes the fused decoder for models of a kind whose parity with
            transformers is tested, and transformers for all others.
        model: Generator half of a checkpoint; its weights belong to the decoder afterwards.
        cache: Where keys and values are kept.
        quantization: How weights are held; all but ``none`` needs the fused decoder.

    Raises:
        UnsupportedDecoderError: ``choice`` or ``quantization`` needs the fused decoder, but the
            model is of another kind.
    """
    model_type = model.config.get_text_config().model_type
    reason = "asked for"
    if choice == "transformers" and quantization != "none":
        raise UnsupportedDecoderError(f"{quantization} needs the fused decoder")
    if choice != "transformers":
        try:
            decoder = FusedDecoder(model, cache, quantization)
        except UnsupportedDecoderError as error:
            if choice == "fused" or quantization != "none":
                raise
            reason = str(error)
        else:
            reason = "asked for" if choice == "fused" else "parity is tested for this model type"
            log.info(
                "decoder_chosen",
                decoder="fused",
                model_type=model_type,
                reason=reason,
                quantization=quantization,
            )
            return decoder
    log.info("decoder_chosen", decoder="transformers", model_type=model_type, reason=reason)
    return TransformersDecoder(model, cache)
