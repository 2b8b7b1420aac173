"""Which decoder computes which model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from structlog.testing import capture_logs

from chiasm.common.half_load import load_half
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.model.fused.description import UnsupportedDecoderError
from chiasm.generator.model.fused.fused_decoder import FusedDecoder
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.make_decoder import make_decoder
from chiasm.generator.model.model_spec import read_model_spec
from chiasm.generator.model.transformers_decoder import TransformersDecoder
from tests.fakes.checkpoints import make_llava
from tests.fakes.split_engine import SplitEngine
from tests.fakes.text_models import OTHER_MODEL_TYPE, make_text_model
from tests.fakes.whole_model import WholeModel
from tests.harness.mapped_pages import num_mapped_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import transformers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("other"), OTHER_MODEL_TYPE)


def _load(path: Path) -> tuple[transformers.PreTrainedModel, KVCache]:
    model = load_half(path, "generator", torch.float32)
    layout = KVCacheLayout((GroupSize(1),), 4)
    return model, KVCache(read_model_spec(model), layout, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("choice", ["auto", "fused"])
def test_fused_decoder_computes_a_tested_model_type(llama: Path, choice: str) -> None:
    with capture_logs() as logs:
        decoder = make_decoder(choice, *_load(llama))  # type: ignore[arg-type]  # a parameter

    assert isinstance(decoder, FusedDecoder)
    assert [log["decoder"] for log in logs if log["event"] == "decoder_chosen"] == ["fused"]


def test_no_page_of_the_file_is_held_after_loading(llama: Path) -> None:
    whole = WholeModel(llama)
    prompt = whole.make_prompt(0, 1)

    split = SplitEngine(whole)

    assert num_mapped_bytes(llama / "model.safetensors") == 0
    assert split.generate([prompt]) == [list(prompt.answer)]


def test_transformers_computes_it_if_asked_for(llama: Path) -> None:
    assert isinstance(make_decoder("transformers", *_load(llama)), TransformersDecoder)


def test_auto_leaves_other_model_types_to_transformers_and_says_why(other: Path) -> None:
    with capture_logs() as logs:
        decoder = make_decoder("auto", *_load(other))

    assert isinstance(decoder, TransformersDecoder)
    assert [log["decoder"] for log in logs if log["event"] == "decoder_chosen"] == ["transformers"]
    assert OTHER_MODEL_TYPE in logs[-1]["reason"]


def test_model_that_auto_leaves_to_transformers_is_whole(other: Path) -> None:
    whole = WholeModel(other)
    prompt = whole.make_prompt(num_images=1, seed=3)

    assert SplitEngine(whole).generate([prompt]) == [list(prompt.answer)]


def test_fused_decoder_of_another_model_type_is_refused(other: Path) -> None:
    with pytest.raises(UnsupportedDecoderError, match=f"type '{OTHER_MODEL_TYPE}' are not among"):
        make_decoder("fused", *_load(other))


def test_layer_with_an_unknown_weight_is_left_to_transformers(llama: Path) -> None:
    model, cache = _load(llama)
    layer = model.get_submodule("model.language_model.layers.2.mlp")
    layer.extra = torch.nn.Linear(2, 2)
    num_parameters = len(list(model.parameters()))

    with pytest.raises(UnsupportedDecoderError, match=r"differing: mlp\.extra"):
        make_decoder("fused", model, cache)

    assert len(list(model.parameters())) == num_parameters
    assert isinstance(make_decoder("auto", model, cache), TransformersDecoder)


def test_layer_of_another_kind_of_linear_is_refused(llama: Path) -> None:
    class _Special(torch.nn.Linear):
        """A linear layer that does more, as quantised ones do."""

    model, cache = _load(llama)
    attention = model.get_submodule("model.language_model.layers.0.self_attn")
    attention.o_proj = _Special(64, 64, bias=False)

    with pytest.raises(UnsupportedDecoderError, match=r"self_attn\.o_proj is not a plain linear"):
        make_decoder("fused", model, cache)


def test_model_that_attends_both_ways_is_refused(llama: Path) -> None:
    model, cache = _load(llama)
    model.config.get_text_config().use_bidirectional_attention = True

    with pytest.raises(UnsupportedDecoderError, match="both directions"):
        make_decoder("fused", model, cache)


def test_integers_are_left_out_by_no_decoder_without_a_word(llama: Path, other: Path) -> None:
    with pytest.raises(UnsupportedDecoderError, match="w8a8 needs the fused decoder"):
        make_decoder("transformers", *_load(llama), "w8a8")
    with pytest.raises(UnsupportedDecoderError, match="are not among"):
        make_decoder("auto", *_load(other), "w8a8")


def test_integers_take_a_quarter_of_the_memory_of_float32(llama: Path) -> None:
    exact, quantized = (
        make_decoder("auto", *_load(llama), quantization) for quantization in ("none", "w8a8")
    )

    assert isinstance(exact, FusedDecoder)
    assert isinstance(quantized, FusedDecoder)
    embedding = exact.spec.vocab_size * exact.spec.hidden_size * 4
    ratio = (quantized.num_weight_bytes - embedding) / (exact.num_weight_bytes - embedding)
    assert 0.25 < ratio < 0.4
