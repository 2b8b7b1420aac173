"""The half-loaded decoder on the paged cache against the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.limits import Limits
from chiasm.common.media import RequestContext
from chiasm.generator.admission import Admission, GenerationRequest, SamplingWishes
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.engine.engine import Engine
from chiasm.generator.engine.sampler import Sampler
from chiasm.generator.engine.scheduler import ScheduledSequence, Scheduler, SchedulerLimits
from chiasm.generator.engine.sequence import Sequence
from chiasm.generator.model.forward_batch import build_forward_batch
from chiasm.generator.model.load import CacheRequest, LoadedModel, load_model
from chiasm.generator.model.runner import ModelRunner

if TYPE_CHECKING:
    from chiasm.generator.engine.outputs import EngineState, StepStatistics
    from tests.fakes.whole_model import MediaPrompt, WholeModel

BLOCK_SIZE = 4
MAX_TOKENS = 32
NUM_IMAGES = (0, 1, 3, 0, 1, 3, 1, 3)


class _Split:
    """An engine on the generator half of a checkpoint."""

    def __init__(self, whole: WholeModel, num_blocks: int = 1024) -> None:
        request = CacheRequest(BLOCK_SIZE, 1 << 24, num_blocks, None, 8)
        self.loaded: LoadedModel = load_model(
            whole.path, torch.float32, torch.device("cpu"), request
        )
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        scheduler = Scheduler(self.blocks, SchedulerLimits(256, 8))
        self.engine = Engine(scheduler, ModelRunner(self.loaded.decoder, Sampler()), [self])
        self.most_in_one_forward = 0
        self.num_preemptions = 0

    def observe(self, statistics: StepStatistics) -> None:
        self.most_in_one_forward = max(self.most_in_one_forward, statistics.num_sequences)
        self.num_preemptions += statistics.num_preemptions

    def observe_state(self, state: EngineState) -> None:
        """Only steps are of interest."""

    def make_sequence(self, seq_id: int, prompt: MediaPrompt) -> Sequence:
        admission = Admission(self.loaded.decoder.spec, "tiny", self.loaded.max_model_len, Limits())
        request = GenerationRequest(
            context=RequestContext("request", "attempt", "tenant"),
            token_ids=prompt.token_ids,
            spans=prompt.spans,
            wishes=SamplingWishes(max_tokens=MAX_TOKENS, temperature=0.0),
        )
        sequence = Sequence(seq_id, *admission.check(request))
        for index, embedding in enumerate(prompt.embeddings):
            shape = embedding.ref.tensors[0].shape
            data = bytearray(embedding.buffers[0])
            sequence.embeddings[index] = torch.frombuffer(data, dtype=torch.float32).view(shape)
        return sequence

    def generate(self, prompts: list[MediaPrompt]) -> list[list[int]]:
        sequences = [self.make_sequence(index, prompt) for index, prompt in enumerate(prompts)]
        for sequence in sequences:
            self.engine.add(sequence)
        while self.engine.has_work:
            self.engine.step()
        assert self.blocks.num_used_blocks == 0
        return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]


@pytest.fixture(scope="module")
def prompts(whole_model: WholeModel) -> list[MediaPrompt]:
    return [
        whole_model.make_prompt(count, seed, MAX_TOKENS) for seed, count in enumerate(NUM_IMAGES)
    ]


@pytest.fixture(scope="module")
def gold(prompts: list[MediaPrompt]) -> list[list[int]]:
    return [list(prompt.answer) for prompt in prompts]


def test_reference_answers_wander(gold: list[list[int]]) -> None:
    longest = max(gold, key=len)

    assert len(longest) == MAX_TOKENS
    assert len(set(longest)) >= 20


def test_eight_at_once_equal_the_whole_model(
    whole_model: WholeModel, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    split = _Split(whole_model)

    assert split.generate(prompts) == gold
    assert split.most_in_one_forward >= 4


def test_each_alone_equals_the_whole_model(
    whole_model: WholeModel, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    split = _Split(whole_model)

    assert [split.generate([prompt])[0] for prompt in prompts[:3]] == gold[:3]


def test_preemption_changes_no_token(
    whole_model: WholeModel, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts) + MAX_TOKENS
    num_blocks = -(-longest // BLOCK_SIZE) + 8
    split = _Split(whole_model, num_blocks)

    assert split.generate(prompts) == gold
    assert split.num_preemptions > 0


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_prefill_logits_equal_the_whole_model(whole_model: WholeModel, num_images: int) -> None:
    prompt = whole_model.make_prompt(num_images, seed=40 + num_images)
    expected = whole_model.prefill_logits(prompt)
    split = _Split(whole_model)
    sequence = split.make_sequence(1, prompt)
    split.blocks.grow(sequence, sequence.num_tokens)
    decoder = split.loaded.decoder

    with torch.inference_mode():
        scheduled = [ScheduledSequence(sequence, 0, sequence.num_tokens)]
        batch = build_forward_batch(scheduled, BLOCK_SIZE, decoder.device)
        logits = decoder.compute_logits(decoder.forward(batch)[batch.logit_rows])[0]

    difference = (logits - expected).abs().max() / expected.abs().max()
    assert float(difference) <= 1e-5
