"""Facts about the language model, read from a checkpoint's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.families import PositionScheme, UnsupportedModelError
from chiasm.common.half_load import load_half
from chiasm.generator.model.model_spec import LogitsRule, read_model_spec
from chiasm.generator.model.text_model_io import apply_logits_rule
from tests.fakes.checkpoints import make_qwen2_vl

if TYPE_CHECKING:
    from pathlib import Path

    import transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    path: Path = make_qwen2_vl(tmp_path_factory.mktemp("qwen"))
    return load_half(path, "generator")


def test_sizes_come_from_the_text_configuration(model: transformers.PreTrainedModel) -> None:
    spec = read_model_spec(model)

    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (3, 2, 16)
    assert (spec.hidden_size, spec.vocab_size, spec.max_positions) == (64, 320, 2048)
    assert spec.positions is PositionScheme.MROPE
    assert spec.logits == LogitsRule()


def test_generation_configuration_decides_on_end_tokens(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.generation_config is not None
    monkeypatch.setattr(model.generation_config, "eos_token_id", [4, 9])

    assert read_model_spec(model).eos_token_ids == {4, 9}


def test_end_tokens_fall_back_to_the_model_configuration(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "generation_config", None)

    assert read_model_spec(model).eos_token_ids == {model.config.get_text_config().eos_token_id}


@pytest.mark.parametrize(
    ("window", "kinds", "groups"),
    [
        (None, None, [((0, 1), 0)]),
        (8, None, [((0, 1), 8)]),
        (8, ["sliding_attention", "full_attention"], [((1,), 0), ((0,), 8)]),
        (1 << 20, None, [((0, 1), 0)]),
    ],
    ids=["none", "all", "some", "longer than the context"],
)
def test_layers_are_grouped_by_what_they_see(
    model: transformers.PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    kinds: list[str] | None,
    groups: list[tuple[tuple[int, ...], int]],
) -> None:
    config = model.config.get_text_config()
    monkeypatch.setattr(config, "num_hidden_layers", 2)
    monkeypatch.setattr(config, "sliding_window", window, raising=False)
    monkeypatch.setattr(config, "layer_types", kinds, raising=False)

    found = read_model_spec(model).cache_groups

    assert [(group.layers, group.window) for group in found] == groups


@pytest.mark.parametrize("kind", ["conv", "chunked_attention", "linear_attention", "hybrid"])
def test_layers_of_a_kind_that_is_not_served_are_refused_by_its_name(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    kinds = ["full_attention", kind, "sliding_attention"]
    monkeypatch.setattr(model.config.get_text_config(), "layer_types", kinds)

    with pytest.raises(UnsupportedModelError, match=f"'qwen2_vl_text' has .* kind {kind};"):
        read_model_spec(model)


def test_model_with_a_state_is_refused_whatever_its_layers_are_called(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.get_decoder(), "_is_stateful", True)  # type: ignore[no-untyped-call]

    with pytest.raises(UnsupportedModelError, match="'qwen2_vl_text' carries a state"):
        read_model_spec(model)


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        (LONGROPE, 64),
        ({"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}, 64),
        ({**LONGROPE, "original_max_position_embeddings": 2048}, 2048),
        ({**LONGROPE, "rope_type": "yarn"}, 2048),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        (None, 2048),
    ],
    ids=["longrope", "one kind of layer", "not extended", "yarn", "dynamic", "no angles"],
)
def test_context_ends_where_angles_begin_to_depend_on_the_batch(
    model: transformers.PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    rope: dict[str, object] | None,
    most: int,
) -> None:
    monkeypatch.setattr(model.config.get_text_config(), "rope_parameters", rope)

    spec = read_model_spec(model)

    assert spec.max_positions == most
    assert ("trained for 2048" in spec.positions_bound) == (most < 2048)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("logits_scaling", 4.0, LogitsRule(scale=0.25)),
        ("logit_scale", 0.5, LogitsRule(scale=0.5)),
        ("final_logit_softcapping", 30.0, LogitsRule(softcap=30.0)),
    ],
)
def test_post_processing_of_logits_is_read(
    model: transformers.PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
    expected: LogitsRule,
) -> None:
    monkeypatch.setattr(model.config.get_text_config(), name, value, raising=False)

    assert read_model_spec(model).logits == expected


def test_logits_are_scaled_then_capped() -> None:
    logits = torch.tensor([-100.0, 1.0, 100.0])

    processed = apply_logits_rule(logits, LogitsRule(scale=0.5, softcap=2.0))

    torch.testing.assert_close(processed, 2 * torch.tanh(logits * 0.5 / 2))
    assert torch.equal(apply_logits_rule(logits, LogitsRule()), logits)
