"""Execute one step: build the batch, run the forward, sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.generator.model.forward_batch import build_forward_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.generator.engine.sampler import Sampler
    from chiasm.generator.engine.scheduler import ScheduledStep
    from chiasm.generator.model.decoder import Decoder


class ModelRunner:
    """Turns scheduled sequences into sampled tokens."""

    def __init__(self, decoder: Decoder, sampler: Sampler) -> None:
        self._decoder = decoder
        self._sampler = sampler

    @torch.inference_mode()
    def execute(self, step: ScheduledStep) -> Mapping[int, int | None]:
        """Compute the tokens of ``step`` and sample the next one of each sequence.

        Args:
            step: Sequences with their blocks allocated; at least one.

        Returns:
            The sampled token by ``seq_id``; ``None`` where the logits were not finite.
        """
        batch = build_forward_batch(step.sequences, self._decoder.block_size, self._decoder.device)
        hidden = self._decoder.forward(batch)
        logits = self._decoder.compute_logits(hidden[batch.logit_rows])
        sequences = [scheduled.sequence for scheduled in batch.sequences]
        sampled = self._sampler.sample(
            logits,
            [sequence.sampling for sequence in sequences],
            [sequence.num_tokens for sequence in sequences],
        )
        return {sequence.seq_id: token for sequence, token in zip(sequences, sampled, strict=True)}

    def check_alive(self) -> None:
        """Wait for the device; raise its error if it can compute nothing more.

        A fault inside a CUDA kernel is sticky: it makes every later call of the process fail.
        """
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.device)
