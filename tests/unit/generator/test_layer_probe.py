"""A model is refused at the start unless each of its layers attends by what the cache holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chiasm.common.families import UnsupportedModelError
from chiasm.common.half_load import load_half
from chiasm.generator.model.layer_probe import check_layers
from chiasm.generator.model.model_spec import read_model_spec
from tests.fakes.checkpoints import make_llava_around, make_qwen2_vl

if TYPE_CHECKING:
    from pathlib import Path

    from chiasm.generator.model.model_spec import ModelSpec


class _Convolution(torch.nn.Module):
    """Stands where a layer has its attention, and does not attend."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def _load(path: Path) -> tuple[Any, ModelSpec]:
    # Any: the types of transformers do not know the layers of a decoder.
    model: Any = load_half(path, "generator")
    return model.get_decoder(), read_model_spec(model)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, ModelSpec]:
    return _load(make_llava_around({}, tmp_path))


def test_model_whose_layers_all_attend_once_passes(llama: tuple[Any, ModelSpec]) -> None:
    check_layers(*llama)


def test_model_with_three_axes_of_positions_passes(tmp_path: Path) -> None:
    check_layers(*_load(make_qwen2_vl(tmp_path)))


def test_layer_that_does_not_attend_is_refused(llama: tuple[Any, ModelSpec]) -> None:
    text_model, spec = llama
    text_model.layers[1].self_attn = _Convolution()

    with pytest.raises(UnsupportedModelError, match=r"attends in its layers \[0, 2\]"):
        check_layers(text_model, spec)


def test_layer_that_attends_twice_is_refused(llama: tuple[Any, ModelSpec]) -> None:
    text_model, spec = llama
    text_model.layers[2] = text_model.layers[1]

    with pytest.raises(UnsupportedModelError, match=r"attends in its layers \[0, 1, 1\]"):
        check_layers(text_model, spec)


def test_heads_that_do_not_fit_the_cache_are_refused(llama: tuple[Any, ModelSpec]) -> None:
    text_model, spec = llama

    with pytest.raises(UnsupportedModelError, match=r"heads of \[\(2, 16\)\], .* of \(4, 16\)"):
        check_layers(text_model, replace(spec, num_kv_heads=4))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("stablelm", "does not hand on to its layers"), ("doge", "masks or attention sinks")],
)
def test_model_that_attends_by_its_own_rules_is_refused(
    tmp_path: Path, model_type: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_layers(*_load(make_llava_around({"model_type": model_type}, tmp_path)))
