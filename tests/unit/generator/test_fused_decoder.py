"""The fused decoder against transformers, for every class of text model that it computes."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.half_load import load_half
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.engine.scheduled_step import ScheduledSequence
from chiasm.generator.model.attention_plan import CacheShape
from chiasm.generator.model.forward_batch import build_forward_batch
from chiasm.generator.model.fused.fused_decoder import FusedDecoder
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.model_spec import read_model_spec
from chiasm.kernels.cpu.native import find_kernels
from chiasm.kernels.cpu.quantized_linear import QuantizedKernel
from tests.fakes.checkpoints import make_qwen2_5_vl
from tests.fakes.deepstack_checkpoints import make_qwen3_vl
from tests.fakes.gemma_checkpoints import make_gemma3
from tests.fakes.split_engine import SplitEngine
from tests.fakes.text_models import TEXT_CONFIGS, make_text_model, randomise_vectors
from tests.fakes.whole_model import WholeModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Items

    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.forward_batch import ForwardBatch
    from chiasm.kernels.cpu.quantized_linear import QuantizedWeight
    from tests.fakes.whole_model import MediaPrompt

VISION_MODELS = {
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "gemma3": make_gemma3,
}
CPU = torch.device("cpu")
MAX_TOKENS = 16
NUM_IMAGES = (0, 1, 2, 0)
# Two orders of summing the same float32 products.
FLOAT32_TOLERANCE = 1e-5
# Hidden states are rounded to 8 bits some ten times per layer, in other places by each decoder.
BFLOAT16_TOLERANCE = 3e-2
# Every product is rounded to one part in 127 of its largest values, some twenty times in a row.
INTEGER_TOLERANCE = 0.15


@pytest.fixture(scope="module", params=[*TEXT_CONFIGS, *VISION_MODELS])
def text_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> WholeModel:
    path = tmp_path_factory.mktemp(request.param)
    if make := VISION_MODELS.get(request.param):
        return WholeModel(randomise_vectors(make(path)))
    return WholeModel(make_text_model(path, request.param), attention="eager")


@pytest.fixture(scope="module")
def prompts(text_model: WholeModel) -> list[MediaPrompt]:
    return [text_model.make_prompt(count, 7 + i, MAX_TOKENS) for i, count in enumerate(NUM_IMAGES)]


def test_reference_answers_wander(prompts: list[MediaPrompt]) -> None:
    assert max(len(set(prompt.answer)) for prompt in prompts) >= MAX_TOKENS // 2


def test_tokens_equal_the_whole_model(
    text_model: WholeModel, prompts: list[MediaPrompt], device: torch.device
) -> None:
    split = SplitEngine(text_model, decoder="fused", max_tokens=MAX_TOKENS, device=device)

    assert isinstance(split.loaded.decoder, FusedDecoder)
    assert split.generate(prompts) == [list(prompt.answer) for prompt in prompts]
    assert split.most_in_one_forward == len(prompts)


def test_tokens_without_compiled_kernels_equal_the_whole_model(
    text_model: WholeModel, prompts: list[MediaPrompt]
) -> None:
    split = SplitEngine(text_model, decoder="fused", max_tokens=MAX_TOKENS, kernels="off")

    assert split.generate(prompts) == [list(prompt.answer) for prompt in prompts]


def test_chunks_beside_decodes_change_no_token(
    text_model: WholeModel, prompts: list[MediaPrompt], device: torch.device
) -> None:
    split = SplitEngine(
        text_model, decoder="fused", max_tokens=MAX_TOKENS, max_step_tokens=11, device=device
    )

    assert split.generate(prompts) == [list(prompt.answer) for prompt in prompts]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)],
    ids=["float32", "bfloat16"],
)
def test_logits_are_near_those_of_transformers(
    text_model: WholeModel,
    prompts: list[MediaPrompt],
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
) -> None:
    logits = {}
    for choice in ("fused", "transformers"):
        split = SplitEngine(text_model, decoder=choice, dtype=dtype, device=device)
        logits[choice] = _compute_mixed_logits(split, prompts)

    expected = logits["transformers"].float()
    difference = (logits["fused"].float() - expected).norm() / expected.norm()
    assert float(difference) <= tolerance


def test_logits_of_integers_are_near_those_of_floats(
    text_model: WholeModel, prompts: list[MediaPrompt]
) -> None:
    exact, quantized = (
        _compute_mixed_logits(SplitEngine(text_model, quantization=quantization), prompts)
        for quantization in ("none", "w8a8")
    )

    difference = (quantized - exact).norm() / exact.norm()
    # Random weights are the hardest case: nothing in them makes up for a rounding.
    assert 0 < float(difference) <= INTEGER_TOLERANCE


def test_integers_with_our_kernels_and_without_give_logits_that_are_near(
    text_model: WholeModel, prompts: list[MediaPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_kernels("auto") is None:
        pytest.skip("no compiled kernels")
    multiply, widths = QuantizedKernel.multiply, []

    def record(
        kernel: QuantizedKernel, weight: QuantizedWeight, rows: torch.Tensor
    ) -> torch.Tensor:
        widths.append(weight.num_outputs)
        return multiply(kernel, weight, rows)

    monkeypatch.setattr(QuantizedKernel, "multiply", record)
    ours = SplitEngine(text_model, quantization="w8a8")
    logits = _compute_mixed_logits(ours, prompts)
    spec, num_forwards = ours.loaded.decoder.spec, 2
    assert len(widths) == num_forwards * (4 * spec.num_layers + 1)
    assert widths.count(spec.vocab_size) == num_forwards

    theirs = SplitEngine(text_model, quantization="w8a8", kernels="off")
    expected = _compute_mixed_logits(theirs, prompts)

    assert float((logits - expected).norm() / expected.norm()) <= INTEGER_TOLERANCE / 10
    assert len(widths) == num_forwards * (4 * spec.num_layers + 1)


def _compute_mixed_logits(split: SplitEngine, prompts: Items[MediaPrompt]) -> torch.Tensor:
    """Return the logits of all rows of two forwards: first chunks, then chunks and a decode."""
    sequences = [split.make_sequence(index, prompt) for index, prompt in enumerate(prompts)]
    for sequence in sequences:
        for index in range(len(sequence.prompt.spans)):
            sequence.embeddings[index] = split.embeddings[sequence.seq_id, index]
        sequence.token_ids.append(1)
        split.blocks.grow(sequence, sequence.num_tokens)
    decoder = split.loaded.decoder
    # The first prompt is computed whole, so that it decodes beside the others' second chunks.
    middles = [sequences[0].num_prompt_tokens, *(s.num_prompt_tokens // 2 for s in sequences[1:])]
    ends = [sequences[0].num_tokens, *(s.num_prompt_tokens for s in sequences[1:])]
    steps = (
        [ScheduledSequence(s, 0, n) for s, n in zip(sequences, middles, strict=True)],
        [
            ScheduledSequence(s, start, end - start)
            for s, start, end in zip(sequences, middles, ends, strict=True)
        ],
    )
    batches = [build_forward_batch(step, CacheShape.of(decoder)) for step in steps]
    assert len(batches[1].decode_groups) == 1
    with torch.inference_mode():
        return torch.cat([_all_logits(decoder, batch) for batch in batches])


def _all_logits(decoder: Decoder, batch: ForwardBatch) -> torch.Tensor:
    return decoder.compute_logits(decoder.forward(batch))


def test_forward_without_a_sampled_row_has_no_logits(text_model: WholeModel) -> None:
    split = SplitEngine(text_model, decoder="fused")
    hidden = torch.zeros(0, split.loaded.decoder.spec.hidden_size)

    logits = split.loaded.decoder.compute_logits(hidden)

    assert logits.shape == (0, split.loaded.decoder.spec.vocab_size)


@pytest.fixture
def _collects_only_what_is_new() -> Iterator[None]:
    """Spare the collector what other tests have left, which takes it seconds to go through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_collects_only_what_is_new")
def test_no_weight_is_held_twice(text_model: WholeModel) -> None:
    model = load_half(text_model.path, "generator", torch.float32)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head, embedding = model.get_submodule("lm_head"), model.get_input_embeddings()
    is_tied = head.weight is embedding.weight
    weights = {id(tensor): tensor for tensor in parameters.values()}
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    text_weights = [
        weakref.ref(tensor) for tensor in weights.values() if tensor is not embedding.weight
    ]
    # Query and key norms are repeated per head; a tied head is packed beside the embedding.
    config = model.config.get_text_config()
    num_repeats = config.num_attention_heads + config.num_key_value_heads - 2
    q_norm_bytes = [w.nbytes for name, w in parameters.items() if name.endswith("q_norm.weight")]
    spare = num_repeats * sum(q_norm_bytes) + (embedding.weight.nbytes if is_tied else 0)
    spec = read_model_spec(model)
    sizes = tuple(GroupSize(1, group.window) for group in spec.cache_groups)
    cache = KVCache(spec, KVCacheLayout(sizes, 4), torch.float32, CPU)
    del parameters, weights, head

    decoder = FusedDecoder(model, cache)

    gc.collect()
    left = [tensor for reference in text_weights if (tensor := reference()) is not None]
    assert left == []
    assert sum(parameter.nbytes for parameter in model.parameters()) == embedding.weight.nbytes
    assert decoder.num_weight_bytes == num_bytes + spare
