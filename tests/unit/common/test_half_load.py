"""Halves of tiny checkpoints of the served families against the whole models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.half_load import CheckpointError, load_half
from tests.fakes.checkpoints import make_llava, make_qwen2_5_vl, make_qwen2_vl
from tests.fakes.pixtral_checkpoints import make_mistral3, make_pixtral
from tests.fakes.sound_checkpoints import make_qwen2_5_omni, make_qwen2_audio, nest_thinker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import transformers

MAKERS = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava": make_llava,
    "pixtral": make_pixtral,
    "mistral3": make_mistral3,
    "qwen2_audio": make_qwen2_audio,
    "qwen2_5_omni": make_qwen2_5_omni,
}


@pytest.fixture(scope="module", params=MAKERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = MAKERS[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("qwen"))


def _load_whole(path: Path) -> transformers.PreTrainedModel:
    import transformers

    model = transformers.AutoModelForMultimodalLM.from_pretrained(path)
    assert isinstance(model, transformers.PreTrainedModel)
    return model


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_both_halves_together_are_the_whole_and_bit_equal(checkpoint: Path) -> None:
    whole = _load_whole(checkpoint)
    expected = dict(whole.named_parameters())

    encoder, generator = load_half(checkpoint, "encoder"), load_half(checkpoint, "generator")

    assert _count(encoder) + _count(generator) == _count(whole)
    for half in (encoder, generator):
        for name, parameter in half.named_parameters():
            assert torch.equal(parameter, expected[name]), name
            assert not parameter.requires_grad


def test_generator_half_has_the_head_and_no_tower(checkpoint: Path) -> None:
    names = {name for name, _ in load_half(checkpoint, "generator").named_parameters()}

    assert "lm_head.weight" in names
    assert not any("vis" in name or "projector" in name for name in names)


def test_encoder_half_has_no_language_model(checkpoint: Path) -> None:
    names = {name for name, _ in load_half(checkpoint, "encoder").named_parameters()}

    assert names
    assert not any("language_model" in name or "lm_head" in name for name in names)


def test_the_thinker_is_found_in_a_checkpoint_with_a_talker(tmp_path: Path) -> None:
    expected = {
        name: parameter
        for side in ("encoder", "generator")
        for name, parameter in load_half(make_qwen2_5_omni(tmp_path), side).named_parameters()
    }

    nested = nest_thinker(tmp_path)

    for side in ("encoder", "generator"):
        half = load_half(nested, side)
        assert half.config.model_type == "qwen2_5_omni_thinker"
        assert all(torch.equal(p, expected.pop(name)) for name, p in half.named_parameters())
    assert not expected


def test_calling_a_child_of_the_other_half_fails(qwen: Path) -> None:
    generator = load_half(qwen, "generator")

    with pytest.raises(RuntimeError, match=r"model\.visual is not loaded"):
        generator.get_submodule("model.visual")(torch.zeros(1))


def test_tied_head_stays_tied_in_the_generator(qwen: Path, tmp_path: Path) -> None:
    whole = _load_whole(qwen)
    config = whole.config
    config.tie_word_embeddings = True
    tied = type(whole)(config)
    tied.save_pretrained(tmp_path)

    encoder, generator = load_half(tmp_path, "encoder"), load_half(tmp_path, "generator")

    head = generator.get_submodule("lm_head")
    assert head.weight is generator.get_submodule("model.language_model.embed_tokens").weight
    assert _count(encoder) + _count(generator) == _count(tied)


def test_dtype_converts_parameters(qwen: Path) -> None:
    generator = load_half(qwen, "generator", torch.bfloat16)

    assert {parameter.dtype for parameter in generator.parameters()} == {torch.bfloat16}


def test_without_dtype_the_checkpoint_decides(qwen: Path, tmp_path: Path) -> None:
    whole = _load_whole(qwen)
    torch.nn.Module.to(whole, torch.bfloat16)
    whole.save_pretrained(tmp_path)

    generator = load_half(tmp_path, "generator")

    assert {parameter.dtype for parameter in generator.parameters()} == {torch.bfloat16}


def test_missing_weight_is_refused_by_name(qwen: Path, tmp_path: Path) -> None:
    whole = _load_whole(qwen)
    state = {key: value for key, value in whole.state_dict().items() if "layers.1.mlp" not in key}
    whole.save_pretrained(tmp_path, state_dict=state)

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp"):
        load_half(tmp_path, "generator")


def test_weight_missing_in_the_other_half_does_not_matter(qwen: Path, tmp_path: Path) -> None:
    whole = _load_whole(qwen)
    state = {key: value for key, value in whole.state_dict().items() if "visual" not in key}
    whole.save_pretrained(tmp_path, state_dict=state)

    assert _count(load_half(tmp_path, "generator")) > 0


def test_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="configuration"):
        load_half(tmp_path, "generator")


def test_unknown_architecture_is_refused(qwen: Path, tmp_path: Path) -> None:
    config = json.loads((qwen / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match="NoSuchModel"):
        load_half(tmp_path, "generator")


def test_folder_without_weights_is_refused(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((qwen / "config.json").read_text())

    with pytest.raises(CheckpointError, match="weights"):
        load_half(tmp_path, "generator")


@pytest.mark.parametrize("num_bytes", [0, 4, 100])
def test_truncated_weights_are_refused(qwen: Path, tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "config.json").write_text((qwen / "config.json").read_text())
    weights = (qwen / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:num_bytes])

    with pytest.raises(CheckpointError, match=r"^Cannot load the weights of .*$"):
        load_half(tmp_path, "generator")


def test_pointer_of_git_lfs_is_refused(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((qwen / "config.json").read_text())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (tmp_path / "model.safetensors").write_text(pointer)

    with pytest.raises(CheckpointError, match="Cannot load the weights of"):
        load_half(tmp_path, "generator")


def test_wrong_type_in_the_configuration_is_refused(qwen: Path, tmp_path: Path) -> None:
    config = json.loads((qwen / "config.json").read_text())
    config["text_config"]["hidden_size"] = "wide"
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match="hidden_size") as caught:
        load_half(tmp_path, "generator")
    assert "\n" not in str(caught.value)
