"""Pictures that attend both ways: never cut, cached whole, equal to the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.generator.engine.chunking import Chunking
from tests.fakes.gemma_checkpoints import NUM_IMAGE_TOKENS, make_gemma3
from tests.fakes.generator_engine import output_of
from tests.fakes.split_engine import BLOCK_SIZE, SplitEngine
from tests.fakes.whole_model import WholeModel

if TYPE_CHECKING:
    from chiasm.generator.engine.scheduled_step import ScheduledStep
    from chiasm.generator.model.make_decoder import DecoderChoice
    from tests.fakes.whole_model import MediaPrompt

NUM_IMAGES = (1, 2, 0, 1, 3)
# More than the prompts have, so that no block leaves the cache.
_LONG_WINDOW = 128


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeModel:
    return WholeModel(make_gemma3(tmp_path_factory.mktemp("gemma3")))


@pytest.fixture(scope="module")
def long_window(tmp_path_factory: pytest.TempPathFactory) -> WholeModel:
    return WholeModel(make_gemma3(tmp_path_factory.mktemp("long"), sliding_window=_LONG_WINDOW))


@pytest.fixture(scope="module")
def prompts(whole: WholeModel) -> list[MediaPrompt]:
    return [whole.make_prompt(count, 20 + seed) for seed, count in enumerate(NUM_IMAGES)]


def _record(split: SplitEngine, monkeypatch: pytest.MonkeyPatch) -> list[ScheduledStep]:
    """Return a list that every later step is added to."""
    steps: list[ScheduledStep] = []
    schedule = split.scheduler.schedule

    def record() -> ScheduledStep:
        steps.append(schedule())
        return steps[-1]

    monkeypatch.setattr(split.scheduler, "schedule", record)
    return steps


def _check_uncut(steps: list[ScheduledStep]) -> int:
    """Assert that no chunk begins or ends within a group; return how many groups were computed."""
    num_groups = 0
    for item in (item for step in steps for item in step.sequences):
        for span in item.sequence.prompt.spans:
            for begin, end in [span.both_ways or (0, 0)]:
                assert not begin < item.start < end
                assert not begin < item.end < end
                num_groups += item.start <= begin < item.end
    return num_groups


@pytest.mark.parametrize("decoder", ["fused", "transformers"])
@pytest.mark.parametrize("max_step_tokens", [1, 7, 64])
@pytest.mark.parametrize("num_blocks", [None, 32])
@pytest.mark.parametrize("fixed_tokens", [0, 2 * BLOCK_SIZE])
def test_no_chunk_is_cut_within_a_picture_whatever_the_step_and_the_cache(
    whole: WholeModel,
    prompts: list[MediaPrompt],
    monkeypatch: pytest.MonkeyPatch,
    decoder: DecoderChoice,
    max_step_tokens: int,
    num_blocks: int | None,
    fixed_tokens: int,
) -> None:
    split = SplitEngine(
        whole,
        num_blocks=num_blocks or 1024,
        max_step_tokens=max(max_step_tokens, fixed_tokens),
        chunking=Chunking(fixed_tokens),
        decoder=decoder,
    )
    steps = _record(split, monkeypatch)

    assert split.generate(prompts) == [list(prompt.answer) for prompt in prompts]
    assert _check_uncut(steps) >= sum(NUM_IMAGES)
    if num_blocks and max_step_tokens > 1:
        assert split.num_preemptions > 0


@pytest.mark.parametrize("decoder", ["fused", "transformers"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_same_picture_before_other_text_is_found_whole_or_not_at_all(
    long_window: WholeModel,
    monkeypatch: pytest.MonkeyPatch,
    decoder: DecoderChoice,
    block_size: int,
    num_kept: int,
) -> None:
    """The prompts part right behind the expansion, or later."""
    first = long_window.make_prompt(1, 31)
    (span,) = first.spans
    begin, end = span.both_ways or (0, 0)
    start = span.end + num_kept
    other = long_window.change_text(first, start, 40 + num_kept)
    split = SplitEngine(long_window, 4096 // block_size, block_size, decoder=decoder)
    split.generate([first])
    steps = _record(split, monkeypatch)
    sequence = split.make_sequence(100, other)

    split.engine.add(sequence)
    split.provide_all()
    split.run()

    common = next(
        (
            i
            for i, pair in enumerate(zip(first.token_ids, other.token_ids, strict=False))
            if pair[0] != pair[1]
        ),
        start,
    )
    expected = max(n for n in range(0, common + 1, block_size) if not begin < n < end)
    assert output_of(sequence) == list(other.answer)
    assert sequence.num_cached_tokens == expected
    _check_uncut(steps)


def test_another_picture_before_the_same_text_is_not_found(long_window: WholeModel) -> None:
    first = long_window.make_prompt(1, 31)
    changed = replace(first.spans[0].ref, embedding_id=b"o" * 32)
    other = replace(first, spans=(replace(first.spans[0], ref=changed),))
    split = SplitEngine(long_window, block_size=1)
    split.generate([first])
    sequence = split.make_sequence(100, other)

    split.engine.add(sequence)
    split.provide_all()
    split.run()

    assert sequence.num_cached_tokens == first.spans[0].offset


def test_steps_full_of_decodes_do_not_keep_a_picture_waiting(
    whole: WholeModel, prompts: list[MediaPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = SplitEngine(whole, max_step_tokens=NUM_IMAGE_TOKENS)
    text = whole.make_prompt(0, 50)
    split.engine.add(split.make_sequence(1, text))
    for _ in range(3):
        split.engine.step()
    steps = _record(split, monkeypatch)
    split.engine.add(split.make_sequence(2, prompts[0]))
    split.provide_all()

    for _ in range(4):
        split.engine.step()

    items = [item for step in steps for item in step.sequences]
    assert any(item.sequence.seq_id == 1 and item.is_decode for item in items)
    assert _check_uncut(steps) == 1
    assert max(step.num_prefill_tokens for step in steps) >= NUM_IMAGE_TOKENS
    split.run()


def test_logits_within_pictures_are_those_of_the_whole_model(
    whole: WholeModel, prompts: list[MediaPrompt]
) -> None:
    """By the log probabilities of the prompt, which look at every row."""
    split = SplitEngine(whole, max_step_tokens=7)
    sequence = split.make_sequence(1, prompts[-1])
    sequence.sampling = replace(sequence.sampling, num_prompt_logprobs=1)
    split.engine.add(sequence)
    split.provide_all()

    told: list[float] = []
    while split.engine.has_work:
        for output in split.engine.step():
            if output.prompt_logprobs is not None:
                told += [one.logprob for one in output.prompt_logprobs.logprobs]

    logprobs = whole.prefill_logits(prompts[-1]).log_softmax(dim=-1)[:-1]
    expected = logprobs.gather(1, torch.tensor(prompts[-1].token_ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(told), expected, rtol=0, atol=1e-4)
