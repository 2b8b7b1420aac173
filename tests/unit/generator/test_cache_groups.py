"""Layers with a sliding window keep only what later tokens see, and no token changes by it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from chiasm.generator.engine.block_group import count_most_blocks
from chiasm.generator.engine.sequence import Sequence
from tests.fakes.generator_engine import output_of
from tests.fakes.split_engine import BLOCK_SIZE, SplitEngine
from tests.fakes.text_models import make_text_model
from tests.fakes.whole_model import WholeModel

if TYPE_CHECKING:
    from tests.fakes.whole_model import MediaPrompt

MAX_TOKENS = 40
WINDOW = 8
NUM_IMAGES = (0, 1, 2, 1)
# Groups of the models by their windows: all layers have one; some have one.
WINDOWS = {"mistral": (WINDOW,), "gemma2": (0, WINDOW)}


@pytest.fixture(scope="module", params=WINDOWS)
def windowed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> WholeModel:
    path = make_text_model(tmp_path_factory.mktemp(request.param), request.param)
    return WholeModel(path, attention="eager")


@pytest.fixture(scope="module")
def prompts(windowed: WholeModel) -> list[MediaPrompt]:
    return [windowed.make_prompt(count, 3 + i, MAX_TOKENS) for i, count in enumerate(NUM_IMAGES)]


@pytest.fixture(scope="module")
def gold(prompts: list[MediaPrompt]) -> list[list[int]]:
    return [list(prompt.answer) for prompt in prompts]


@pytest.fixture(params=["fused", "transformers"])
def decoder(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def make_split(windowed: WholeModel, decoder: str, **options: int) -> SplitEngine:
    return SplitEngine(windowed, decoder=decoder, max_tokens=MAX_TOKENS, **options)  # type: ignore[arg-type]  # parameters of the test


def held_blocks(sequence: Sequence, group: int) -> int:
    table = sequence.tables[group]
    return len(table.blocks) - table.num_dropped


def test_blocks_behind_the_window_are_given_back(
    windowed: WholeModel, prompts: list[MediaPrompt], gold: list[list[int]], decoder: str
) -> None:
    split = make_split(windowed, decoder, max_step_tokens=16)
    windows = tuple(size.window for size in split.loaded.layout.sizes)
    assert windows in WINDOWS.values()
    sequence = split.make_sequence(1, prompts[2])
    split.engine.add(sequence)
    split.provide_all()

    while split.engine.has_work:
        split.engine.step()
        split.scheduler.check_invariants()
        for group, window in enumerate(windows):
            most = count_most_blocks(sequence.max_num_tokens, 16, window, BLOCK_SIZE)
            assert held_blocks(sequence, group) <= most
            if window and sequence.num_output_tokens > 1:
                assert held_blocks(sequence, group) <= -(-WINDOW // BLOCK_SIZE) + 1

    assert output_of(sequence) == gold[2]


@pytest.mark.parametrize("max_step_tokens", [5, 256])
@pytest.mark.parametrize("block_size", [1, 4])
def test_chunks_and_blocks_of_any_size_change_no_token(
    windowed: WholeModel,
    prompts: list[MediaPrompt],
    gold: list[list[int]],
    decoder: str,
    max_step_tokens: int,
    block_size: int,
) -> None:
    split = make_split(windowed, decoder, max_step_tokens=max_step_tokens, block_size=block_size)

    assert split.generate(prompts) == gold


def test_preemption_changes_no_token(
    windowed: WholeModel, prompts: list[MediaPrompt], gold: list[list[int]], decoder: str
) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts) + MAX_TOKENS
    split = make_split(
        windowed, decoder, num_blocks=-(-longest // BLOCK_SIZE) + 2, max_step_tokens=64
    )

    assert split.generate(prompts) == gold
    # A window alone never fills a cache that holds a whole context.
    assert bool(split.num_preemptions) == (len(split.loaded.layout.sizes) == 2)


@pytest.mark.parametrize("max_step_tokens", [16, 256])
def test_prefix_is_found_by_what_its_next_token_sees(
    windowed: WholeModel,
    prompts: list[MediaPrompt],
    gold: list[list[int]],
    decoder: str,
    max_step_tokens: int,
) -> None:
    split = make_split(windowed, decoder, max_step_tokens=max_step_tokens)
    split.generate(prompts[2:3])

    again = split.make_sequence(20, prompts[2])
    split.engine.add(again)
    split.provide_all()
    split.engine.step()
    dropped = [table.num_dropped for table in again.tables.values()]
    split.run()

    assert again.num_cached_tokens >= again.num_prompt_tokens - 2 * BLOCK_SIZE
    assert [bool(count) for count in dropped] == [
        size.window > 0 for size in split.loaded.layout.sizes
    ]
    assert output_of(again) == gold[2]


def test_forks_share_what_is_left_of_the_prompt(
    windowed: WholeModel, prompts: list[MediaPrompt], gold: list[list[int]], decoder: str
) -> None:
    split = make_split(windowed, decoder, max_step_tokens=16)
    parent = split.make_sequence(1, prompts[1])
    child = Sequence(2, parent.prompt, dataclasses.replace(parent.sampling))
    child.embeddings = parent.embeddings
    parent.forks = (child,)
    split.engine.add(parent)
    split.provide_all()

    split.run()

    assert output_of(parent) == output_of(child) == gold[1]
    assert split.blocks.num_used_blocks == 0
