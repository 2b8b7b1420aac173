"""Both decoders on the paged cache against the whole model, for the served families."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.scheduled_step import ScheduledSequence
from chiasm.generator.model import attention
from chiasm.generator.model.attention_plan import CacheShape
from chiasm.generator.model.forward_batch import build_forward_batch
from tests.fakes.generator_engine import output_of
from tests.fakes.split_engine import BLOCK_SIZE, MAX_TOKENS, SplitEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.generator.engine.logprobs import TokenLogprobs
    from chiasm.generator.engine.sequence import Sequence
    from tests.fakes.whole_model import MediaPrompt, WholeModel

    MakeSplit = Callable[..., SplitEngine]

NUM_IMAGES = (0, 1, 3, 0, 1, 3, 1, 3)


@pytest.fixture(scope="module")
def prompts(whole_model: WholeModel) -> list[MediaPrompt]:
    return [
        whole_model.make_prompt(count, seed, MAX_TOKENS) for seed, count in enumerate(NUM_IMAGES)
    ]


@pytest.fixture(params=["fused", "transformers"])
def make_split(
    request: pytest.FixtureRequest, whole_model: WholeModel, device: torch.device
) -> MakeSplit:
    return partial(SplitEngine, whole_model, decoder=request.param, device=device)


@pytest.fixture(scope="module")
def gold(prompts: list[MediaPrompt]) -> list[list[int]]:
    return [list(prompt.answer) for prompt in prompts]


def test_reference_answers_wander(gold: list[list[int]]) -> None:
    longest = max(gold, key=len)

    assert len(longest) == MAX_TOKENS
    assert len(set(longest)) >= 20


def test_eight_at_once_equal_the_whole_model(
    make_split: MakeSplit, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    split = make_split()

    assert split.generate(prompts) == gold
    assert split.most_in_one_forward >= 4


def test_each_alone_equals_the_whole_model(
    make_split: MakeSplit, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    split = make_split()

    assert [split.generate([prompt])[0] for prompt in prompts[:3]] == gold[:3]


def test_contexts_gathered_in_parts_change_no_token(
    make_split: MakeSplit,
    prompts: list[MediaPrompt],
    gold: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_GATHER_BYTES", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(attention, "_MIN_GATHERED_SEQUENCES", 3)

    assert make_split().generate(prompts) == gold


def test_preemption_changes_no_token(
    make_split: MakeSplit, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts) + MAX_TOKENS
    num_blocks = -(-longest // BLOCK_SIZE) + 8
    split = make_split(num_blocks)

    assert split.generate(prompts) == gold
    assert split.num_preemptions > 0


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_prefill_logits_equal_the_whole_model(
    whole_model: WholeModel, make_split: MakeSplit, num_images: int
) -> None:
    prompt = whole_model.make_prompt(num_images, seed=40 + num_images)
    expected = whole_model.prefill_logits(prompt)[-1]
    split = make_split()
    sequence = split.make_sequence(1, prompt)
    for index in range(num_images):
        sequence.embeddings[index] = split.embeddings[1, index]
    split.blocks.grow(sequence, sequence.num_tokens)
    decoder = split.loaded.decoder
    calls: list[int] = []
    decoder.call_before_layers(partial(calls.append, 1))

    with torch.inference_mode():
        scheduled = [ScheduledSequence(sequence, 0, sequence.num_tokens)]
        batch = build_forward_batch(scheduled, CacheShape.of(decoder))
        logits = decoder.compute_logits(decoder.forward(batch)[batch.logit_rows])[0].cpu()

    difference = (logits - expected).abs().max() / expected.abs().max()
    assert float(difference) <= 1e-5
    assert len(calls) == decoder.spec.num_layers


def _scores_of(split: SplitEngine, sequence: Sequence) -> list[TokenLogprobs]:
    """Run the engine; return what it tells of the prompt, which must come gapless and once."""
    told: list[TokenLogprobs] = []
    while split.engine.has_work:
        for output in split.engine.step():
            scored = output.prompt_logprobs
            if output.seq_id == sequence.seq_id and scored is not None:
                assert scored.start == len(told) + 1
                told += scored.logprobs
    return told


@pytest.mark.parametrize("max_step_tokens", [7, 256])
@pytest.mark.parametrize("is_preempted", [False, True])
def test_prompt_logprobs_are_those_of_the_whole_model_also_behind_cached_prefixes(
    whole_model: WholeModel,
    make_split: MakeSplit,
    prompts: list[MediaPrompt],
    max_step_tokens: int,
    is_preempted: bool,
) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts) + MAX_TOKENS
    num_blocks = -(-longest // BLOCK_SIZE) + 8 if is_preempted else 1024
    split = make_split(num_blocks, max_step_tokens=max_step_tokens)
    split.generate(prompts[1:2])  # the prefix cache has the prompt now
    for index in (2, 5, 7):
        split.engine.add(split.make_sequence(index, prompts[index]))
    sequence = split.make_sequence(50, prompts[1])
    sequence.sampling = replace(sequence.sampling, num_prompt_logprobs=3)
    split.engine.add(sequence)
    split.provide_all()

    told = _scores_of(split, sequence)

    expected = whole_model.prefill_logits(prompts[1]).log_softmax(dim=-1)[:-1]
    token_ids = torch.tensor(prompts[1].token_ids[1:])
    best = expected.topk(3)
    own = expected.gather(1, token_ids[:, None])[:, 0]
    assert sequence.num_cached_tokens == 0
    assert bool(split.num_preemptions) == is_preempted
    assert torch.allclose(torch.tensor([one.logprob for one in told]), own, rtol=0, atol=1e-4)
    tops = torch.tensor([one.top_logprobs for one in told])
    assert torch.allclose(tops, best.values, rtol=0, atol=1e-4)
    ranks = (expected > own[:, None] + 1e-4).sum(dim=1) + 1
    assert [one.rank for one in told] == pytest.approx(ranks.tolist(), abs=1)
    assert output_of(sequence) == list(prompts[1].answer)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("max_step_tokens", [1, 7, 64])
def test_chunks_and_blocks_of_any_size_change_no_token(
    make_split: MakeSplit,
    prompts: list[MediaPrompt],
    gold: list[list[int]],
    block_size: int,
    max_step_tokens: int,
) -> None:
    split = make_split(4096 // block_size, block_size, max_step_tokens)
    few = slice(0, 2) if max_step_tokens == 1 else slice(0, 4)

    assert split.generate(prompts[few]) == gold[few]


def test_prefix_hits_change_no_token(
    make_split: MakeSplit, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    split = make_split()
    first = split.generate(prompts[:3])

    sequences = [split.make_sequence(10 + index, prompts[index]) for index in range(3)]
    for sequence in sequences:
        split.engine.add(sequence)
    split.run()
    split.provide_all()
    split.run()

    assert [output_of(sequence) for sequence in sequences] == gold[:3] == first
    for sequence in sequences:
        groups = [span.both_ways for span in sequence.prompt.spans]
        # A prefix that would end within positions that attend both ways ends before them.
        uncut = max((group[1] - group[0] for group in groups if group), default=0)
        least = sequence.num_prompt_tokens - 2 * BLOCK_SIZE - uncut
        assert sequence.num_cached_tokens >= least


def test_embeddings_in_reverse_order_change_no_token(
    make_split: MakeSplit, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    split = make_split(max_step_tokens=16)
    sequences = [split.make_sequence(index, prompt) for index, prompt in enumerate(prompts)]
    for sequence in sequences:
        split.engine.add(sequence)

    for key in sorted(split.embeddings, reverse=True):
        for _ in range(3):
            split.engine.step()
        split.provide(*key)
        split.scheduler.check_invariants()
    split.run()

    assert [output_of(sequence) for sequence in sequences] == gold


def test_cancel_storm_beside_them_changes_no_token(
    make_split: MakeSplit, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    split = make_split(max_step_tokens=32)
    sequences = [split.make_sequence(index, prompts[index]) for index in range(3)]
    for sequence in sequences:
        split.engine.add(sequence)
    split.provide_all()

    next_id = 100
    while split.engine.has_work:
        if next_id < 160:
            prompt = prompts[next_id % len(prompts)]
            split.engine.add(split.make_sequence(next_id, prompt))
            split.provide_all()
            split.engine.cancel(next_id - next_id % 5)
            next_id += 1
        else:
            for seq_id in range(100, 160):
                split.engine.cancel(seq_id)
        split.engine.step()
        split.scheduler.check_invariants()

    assert [output_of(sequence) for sequence in sequences] == gold[:3]
    assert split.blocks.num_used_blocks == 0


def test_deterministic_logits_do_not_depend_on_the_company(
    make_split: MakeSplit, prompts: list[MediaPrompt], gold: list[list[int]]
) -> None:
    """In bits, not only in tokens: with prefix hits, preemption and any company."""
    chunking = Chunking(fixed_tokens=2 * BLOCK_SIZE)

    def logits_of(split: SplitEngine, batch: list[MediaPrompt]) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        compute, decoder = split.loaded.decoder.compute_logits, split.loaded.decoder

        def record(hidden: torch.Tensor) -> torch.Tensor:
            logits = compute(hidden)
            seen.extend(logits.clone())
            return logits

        decoder.compute_logits = record  # type: ignore[method-assign]  # to listen in
        assert split.generate(batch) == [gold[prompts.index(prompt)] for prompt in batch]
        return seen

    def bits(rows: list[torch.Tensor]) -> set[bytes]:
        return {row.cpu().numpy().tobytes() for row in rows}

    alone = bits(logits_of(make_split(chunking=chunking), [prompts[1]]))
    crowd = make_split(chunking=chunking)
    assert alone <= bits(logits_of(crowd, prompts))
    longest = max(len(prompt.token_ids) for prompt in prompts) + MAX_TOKENS
    tight = make_split(-(-longest // BLOCK_SIZE) + 8, chunking=chunking)
    assert alone <= bits(logits_of(tight, prompts))
    assert tight.num_preemptions > 0
