"""An engine on the generator half of a checkpoint, without services around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chiasm.common.limits import Limits
from chiasm.common.media import RequestContext
from chiasm.common.sampling import SamplingWishes
from chiasm.generator.admission import Admission, GenerationRequest
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.engine import Engine
from chiasm.generator.engine.sampler import Sampler
from chiasm.generator.engine.scheduler import Scheduler, SchedulerLimits
from chiasm.generator.engine.sequence import Sequence
from chiasm.generator.model.cache_sizes import CacheRequest
from chiasm.generator.model.load import LoadedModel, load_model, replay_steps
from chiasm.generator.model.runner import ModelRunner
from tests.fakes.generator_engine import output_of

if TYPE_CHECKING:
    from chiasm.common.graph_recorder import Recorder
    from chiasm.generator.engine.outputs import EngineState, StepStatistics
    from chiasm.generator.model.make_decoder import DecoderChoice
    from chiasm.kernels.cpu.native import KernelChoice
    from chiasm.kernels.cpu.quantized_layer import Quantization
    from tests.fakes.whole_model import MediaPrompt, WholeModel

BLOCK_SIZE = 4
MAX_TOKENS = 32
MAX_RUNNING = 8
CUT_BY_BUDGET = Chunking()
CPU = torch.device("cpu")


class SplitEngine:
    """An engine on the generator half of a checkpoint."""

    def __init__(
        self,
        whole: WholeModel,
        num_blocks: int = 1024,
        block_size: int = BLOCK_SIZE,
        max_step_tokens: int = 256,
        chunking: Chunking = CUT_BY_BUDGET,
        decoder: DecoderChoice = "auto",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = MAX_TOKENS,
        quantization: Quantization = "none",
        kernels: KernelChoice = "auto",
        device: torch.device = CPU,
        record: Recorder | None = None,
    ) -> None:
        """Load the checkpoint of ``whole`` and build an engine on it."""
        request = CacheRequest(
            block_size, 1 << 24, num_blocks, None, MAX_RUNNING, max_step_tokens, kernels
        )
        self.loaded: LoadedModel = load_model(
            whole.path, dtype, device, request, decoder, quantization
        )
        if record is not None:
            self.loaded = replay_steps(self.loaded, MAX_RUNNING, max_step_tokens, record)
        self.blocks = BlockManager(self.loaded.layout.sizes, block_size)
        max_running = min(MAX_RUNNING, max_step_tokens)
        self.scheduler = Scheduler(
            self.blocks, SchedulerLimits(max_step_tokens, max_running, chunking)
        )
        runner = ModelRunner(
            self.loaded.decoder,
            Sampler(),
            is_deterministic=chunking.is_fixed,
            max_step_tokens=max_step_tokens,
        )
        self.engine = Engine(self.scheduler, runner, [self])
        self.embeddings: dict[tuple[int, int], torch.Tensor] = {}
        self.most_in_one_forward = 0
        self._max_tokens = max_tokens
        self.num_preemptions = 0

    def observe(self, statistics: StepStatistics) -> None:
        """Note what the tests ask for."""
        self.most_in_one_forward = max(self.most_in_one_forward, statistics.num_sequences)
        self.num_preemptions += statistics.num_preemptions

    def observe_state(self, state: EngineState) -> None:
        """Only steps are of interest."""

    def make_sequence(self, seq_id: int, prompt: MediaPrompt) -> Sequence:
        """Return a greedy sequence of ``prompt``; its embeddings wait for ``provide``."""
        admission = Admission(self.loaded.decoder.spec, "tiny", self.loaded.max_model_len, Limits())
        request = GenerationRequest(
            context=RequestContext("request", "attempt", "tenant"),
            token_ids=prompt.token_ids,
            spans=prompt.spans,
            wishes=SamplingWishes(max_tokens=self._max_tokens, temperature=0.0),
        )
        sequence = Sequence(seq_id, *admission.check(request))
        for index, embedding in enumerate(prompt.embeddings):
            shape = embedding.ref.tensors[0].shape
            tensors = [
                torch.frombuffer(bytearray(buffer), dtype=torch.float32).view(shape)
                for buffer in embedding.buffers
            ]
            self.embeddings[seq_id, index] = torch.cat(tensors, dim=1)
        return sequence

    def provide(self, seq_id: int, index: int) -> None:
        """Hand over one embedding of a sequence."""
        self.engine.provide(seq_id, index, self.embeddings.pop((seq_id, index)))

    def provide_all(self) -> None:
        """Hand over all embeddings that wait."""
        for seq_id, index in list(self.embeddings):
            self.provide(seq_id, index)

    def run(self) -> None:
        """Run until all sequences have ended."""
        while self.engine.has_work:
            self.engine.step()
            self.scheduler.check_invariants()

    def generate(self, prompts: list[MediaPrompt]) -> list[list[int]]:
        """Return the output of each prompt, all started at once."""
        sequences = [self.make_sequence(index, prompt) for index, prompt in enumerate(prompts)]
        for sequence in sequences:
            self.engine.add(sequence)
        self.provide_all()
        self.run()
        assert self.blocks.num_used_blocks == 0
        return [output_of(sequence) for sequence in sequences]
