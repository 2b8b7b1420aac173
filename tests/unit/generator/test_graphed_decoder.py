"""Recorded forwards of decodes.

Here their launches are repeated one by one, in Triton's interpreter; tests/gpu has CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chiasm.common.families import PositionScheme
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduled_step import ScheduledSequence
from chiasm.generator.engine.sequence import Prompt, Sequence
from chiasm.generator.model.attention_plan import CacheShape
from chiasm.generator.model.forward_batch import build_forward_batch
from chiasm.generator.model.graph_inputs import GraphLimits, GraphShape
from chiasm.generator.model.graphed_decoder import GraphedDecoder
from chiasm.generator.model.load import replay_steps
from chiasm.generator.model.positions import compute_positions
from tests.fakes.checkpoints import make_qwen2_5_vl
from tests.fakes.gemma_checkpoints import make_gemma3
from tests.fakes.generator_engine import BYTE_SPEC
from tests.fakes.repeater import Repeater
from tests.fakes.split_engine import BLOCK_SIZE, SplitEngine
from tests.fakes.text_models import randomise_vectors
from tests.fakes.whole_model import WholeModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Items

    from chiasm.generator.engine.block_manager import BlockCopy
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.generator.model.model_spec import ModelSpec
    from tests.fakes.whole_model import MediaPrompt

MAKERS = {"qwen2_5_vl": make_qwen2_5_vl, "gemma3": make_gemma3}
MAX_TOKENS = 4
STEP_TOKENS = 16
# Behind room for 8 sequences that decode.
ROWS = STEP_TOKENS + 8


@pytest.fixture(autouse=True)
def _triton(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the caches of a CPU read by Triton's kernels."""
    if triton_device != "cpu":
        pytest.skip("tests of the GPU replay there")
    from chiasm.kernels.triton_kernels import TritonKernels

    monkeypatch.setattr(
        "chiasm.generator.model.load.find_cache_kernels", lambda *_: TritonKernels()
    )


@pytest.fixture(scope="module", params=MAKERS)
def whole_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> WholeModel:
    path = tmp_path_factory.mktemp(request.param)
    return WholeModel(randomise_vectors(MAKERS[request.param](path)))


@pytest.fixture(scope="module")
def prompts(whole_model: WholeModel) -> list[MediaPrompt]:
    return [whole_model.make_prompt(count, 7 + i, MAX_TOKENS) for i, count in enumerate((0, 1, 0))]


@pytest.fixture
def repeater() -> Repeater:
    return Repeater()


@pytest.fixture
def split(whole_model: WholeModel, repeater: Repeater) -> SplitEngine:
    return SplitEngine(
        whole_model, max_tokens=MAX_TOKENS, max_step_tokens=STEP_TOKENS, record=repeater
    )


def test_replayed_tokens_equal_the_whole_model(
    split: SplitEngine, repeater: Repeater, prompts: list[MediaPrompt]
) -> None:
    together = split.generate(prompts)

    assert together == [list(prompt.answer) for prompt in prompts]
    # Chunks, alone and beside decodes, and then all three decode.
    assert repeater.num_repeats[ROWS] >= 2
    assert repeater.num_repeats[4] >= 1

    # What the others left behind disturbs nothing.
    assert split.generate(prompts[1:2]) == [list(prompts[1].answer)]
    assert repeater.num_repeats[1] >= MAX_TOKENS - 2


class Seen:
    """Computes nothing and keeps what the tensors of each batch held."""

    spec = replace(BYTE_SPEC, positions=PositionScheme.MROPE, layer_windows=(0, 8), num_layers=2)
    device = torch.device("cpu")
    block_size = BLOCK_SIZE
    gathers_contexts = False
    dtype = torch.float32

    def __init__(self) -> None:
        self.batches: list[ForwardBatch] = []
        # Any: nested lists of numbers, some one level deep and some two.
        self.values: list[dict[str, Any]] = []

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Return the token ids."""
        return batch.token_ids[:, None].float()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Keep values; what enters leaves."""
        hidden = self.embed(batch) if batch.hidden is None else batch.hidden
        tensors = {"hidden": hidden[:, 0], "positions": batch.positions}
        for group, slots in enumerate(batch.slot_mappings):
            tensors[f"slots {group}"] = slots
            if batch.decode_groups:
                tables, lengths = batch.decode_groups[0].context(group)
                tensors |= {f"tables {group}": tables, f"lengths {group}": lengths}
            if not batch.prefills.is_empty:
                contexts = batch.prefills.context(group, (0, 8)[group])
                names = ("chunks", "chunk tables", "seen")
                tensors |= {
                    f"{name} {group}": tensor for name, tensor in zip(names, contexts, strict=True)
                }
        self.batches.append(batch)
        self.values.append({name: tensor.tolist() for name, tensor in tensors.items()})
        return hidden.clone()

    def call_before_layers(self, callback: Callable[[], None]) -> None:
        """Nothing has layers here."""

    def copy_blocks(self, copies: Items[BlockCopy]) -> None:
        """Nothing is kept here."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what there is."""
        return hidden


def make_item(seq_id: int, start: int, num_tokens: int = 1) -> ScheduledSequence:
    """Return a sequence of a step, on blocks of its own; it decodes unless ``start`` is 0."""
    num_prompt_tokens = 1 if start else num_tokens
    positions = compute_positions(PositionScheme.MROPE, num_prompt_tokens, ())
    tokens = [100 * seq_id + index for index in range(start + num_tokens)]
    prompt = Prompt(tuple(tokens[:num_prompt_tokens]), (), positions)
    sequence = Sequence(seq_id, prompt, SamplingParams(99, temperature=0.0))
    sequence.token_ids.extend(tokens[num_prompt_tokens:])
    for group in range(2):
        sequence.tables[group].blocks.extend(10 * seq_id + 5 * group + index for index in range(4))
    return ScheduledSequence(sequence, start, num_tokens)


def build(*items: ScheduledSequence) -> ForwardBatch:
    """Return the batch of a step."""
    return build_forward_batch(items, CacheShape(BLOCK_SIZE, (0, 8), Seen.device, gathers=False))


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def graphed(seen: Seen) -> GraphedDecoder:
    limits = GraphLimits(4, 5 * BLOCK_SIZE, max_chunks=2, max_rows=9)
    decoder = GraphedDecoder(seen, limits, Repeater())
    seen.batches.clear()
    seen.values.clear()
    return decoder


def test_rows_of_padding_are_neither_kept_nor_attended_to(
    seen: Seen, graphed: GraphedDecoder
) -> None:
    graphed.forward(build(*(make_item(seq_id, 9 + seq_id) for seq_id in range(1, 5))))

    hidden = graphed.forward(build(*(make_item(seq_id, 2 + seq_id) for seq_id in range(1, 4))))

    assert hidden.tolist() == [[103], [204], [305]]
    values = seen.values[-1]
    assert values["hidden"][:3] == [103, 204, 305]
    assert values["positions"] == [[3, 4, 5, 0]] * 3
    assert values["slots 0"] == [10 * 4 + 3, 21 * 4, 31 * 4 + 1, -1]
    assert values["slots 1"] == [15 * 4 + 3, 26 * 4, 36 * 4 + 1, -1]
    assert values["lengths 0"] == values["lengths 1"] == [4, 5, 6, 0]
    assert [row[:4] for row in values["tables 1"][:3]] == [
        [15, 16, 17, 18],
        [25, 26, 27, 28],
        [35, 36, 37, 38],
    ]


@pytest.mark.parametrize(("num_sequences", "size"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_the_next_larger_forward_is_replayed(
    seen: Seen, graphed: GraphedDecoder, num_sequences: int, size: int
) -> None:
    batch = build(*(make_item(1 + index, 3) for index in range(num_sequences)))

    hidden = graphed.forward(batch)

    assert len(hidden) == num_sequences
    assert seen.batches[-1] is not batch
    assert seen.batches[-1].num_tokens == size


def test_chunks_stand_behind_the_room_of_decodes(seen: Seen, graphed: GraphedDecoder) -> None:
    graphed.forward(build(*(make_item(seq_id, 5) for seq_id in range(1, 5)), make_item(5, 0, 5)))

    hidden = graphed.forward(build(make_item(1, 9), make_item(2, 0, 2), make_item(3, 4, 2)))

    assert hidden[:, 0].tolist() == [109, 200, 201, 304, 305]
    values = seen.values[-1]
    assert values["positions"] == [[9, 0, 0, 0, 0, 1, 4, 5, 0]] * 3
    assert values["slots 0"] == [12 * 4 + 1, -1, -1, -1, 20 * 4, 20 * 4 + 1, 31 * 4, 31 * 4 + 1, -1]
    assert values["slots 1"][4:] == [25 * 4, 25 * 4 + 1, 36 * 4, 36 * 4 + 1, -1]
    assert values["lengths 0"] == [10, 0, 0, 0]
    assert values["chunks 0"] == [[0, 2], [2, 2]]
    assert values["chunk tables 1"][1][:2] == [35, 36]
    assert values["seen 0"][:4] == [[0, 1], [0, 2], [0, 5], [0, 6]]
    assert values["seen 1"][:4] == [[0, 1], [0, 2], [0, 5], [0, 6]]


def test_a_chunk_that_is_fewer_than_there_were_leaves_no_other(
    seen: Seen, graphed: GraphedDecoder
) -> None:
    graphed.forward(build(make_item(1, 0, 2), make_item(2, 0, 3)))

    hidden = graphed.forward(build(make_item(3, 0, 2)))

    assert hidden[:, 0].tolist() == [300, 301]
    assert seen.values[-1]["chunks 0"] == [[0, 2], [0, 0]]
    assert seen.values[-1]["lengths 0"] == [0, 0, 0, 0]


def with_media(batch: ForwardBatch, spec: ModelSpec) -> ForwardBatch:
    """Return ``batch`` with an embedding in its last row."""
    rows = torch.ones(1, spec.hidden_size)
    last = torch.tensor([batch.num_tokens - 1])
    return replace(batch, embeddings=rows, embedding_rows=last)


def test_media_are_put_in_before_the_replay(seen: Seen, graphed: GraphedDecoder) -> None:
    batch = with_media(build(make_item(1, 0, 3)), seen.spec)

    graphed.forward(batch)

    assert seen.batches[-1] is not batch


def test_media_of_several_levels_are_the_decoders(
    seen: Seen, graphed: GraphedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "spec", replace(seen.spec, num_deepstack_levels=1))
    batch = with_media(build(make_item(1, 0, 3)), seen.spec)

    graphed.forward(batch)
    assert seen.batches[-1] is batch

    graphed.forward(build(make_item(1, 0, 3)))
    assert seen.batches[-1].num_tokens == 9


@pytest.mark.parametrize(
    "items",
    [
        [make_item(1, 0, 6)],
        [make_item(1 + index, 0, 1) for index in range(3)],
        [make_item(1 + index, 3) for index in range(5)],
        [*(make_item(1 + index, 3) for index in range(5)), make_item(9, 0, 1)],
    ],
    ids=["many tokens", "many chunks", "many decodes", "many decodes beside a chunk"],
)
def test_other_forwards_are_the_decoders(
    seen: Seen, graphed: GraphedDecoder, items: list[ScheduledSequence]
) -> None:
    batch = build(*items)

    hidden = graphed.forward(batch)

    assert seen.batches == [batch]
    assert len(hidden) == batch.num_tokens


@pytest.mark.parametrize("item", [make_item(1, 3), make_item(1, 0, 3)], ids=["decode", "chunk"])
def test_a_context_that_is_too_long_is_the_decoders(seen: Seen, item: ScheduledSequence) -> None:
    batch = build(item)
    width = max(batch.prefills.num_blocks, *(one.num_blocks for one in batch.decode_groups), 0)

    for num_blocks, is_replayed in ((width - 1, False), (width, True)):
        graphed = GraphedDecoder(seen, GraphLimits(4, num_blocks * BLOCK_SIZE), Repeater())
        graphed.forward(batch)
        assert (seen.batches[-1] is not batch) == is_replayed


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (3, (3, 2, 1)), (8, (8, 4, 2, 1)), (20, (20, 16, 8, 4, 2, 1))],
)
def test_sizes_end_at_the_most_sequences(most: int, sizes: tuple[int, ...]) -> None:
    shapes = GraphLimits(most, 99, max_rows=64).shapes

    assert tuple(one.num_rows for one in shapes if not one.num_chunk_rows) == sizes


def test_shapes_with_chunks_end_at_the_tokens_of_a_step() -> None:
    limits = GraphLimits.of(64, max_step_tokens=100, max_context=99)

    mixed = [(one.num_rows, one.num_decodes) for one in limits.shapes if one.num_chunk_rows]

    assert mixed == [(108, 64), (108, 8), (64, 8)]
    assert max(GraphLimits.of(64, 1 << 20, 99).shapes) == GraphShape(1024, 64)


def test_on_a_cpu_nothing_is_recorded(whole_model: WholeModel) -> None:
    loaded = SplitEngine(whole_model).loaded

    assert replay_steps(loaded, 4, 64) is loaded
