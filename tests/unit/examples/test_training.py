"""Training and export of the demo model, with a toy in place of the real architecture."""

from io import BytesIO
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor

from examples.demo_model import model as demo_model
from examples.demo_model import pixels
from examples.demo_model.answerers import LocalAnswerer
from examples.demo_model.dataset import Batch, collate, make_sample
from examples.demo_model.held_out import make_questions
from examples.demo_model.render import render_scene
from examples.demo_model.scenes import sample_scene
from examples.demo_model.tokenizer import load_tokenizer, name_ids
from examples.demo_model.trainer import Trainer, schedule


@pytest.fixture
def trainer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setitem(demo_model.VISION, "depth", 1)
    monkeypatch.setitem(demo_model.TEXT, "num_hidden_layers", 1)
    toy = demo_model.build_model(demo_model.build_config(tokenizer), seed=1)
    return Trainer(toy, 3e-3, name_ids(tokenizer))


@pytest.fixture
def batch(tokenizer: Tokenizer) -> Batch:
    return collate([make_sample(tokenizer, Random(f"step/{index}")) for index in range(2)])


def test_a_few_steps_on_one_batch_lower_both_losses(trainer: Trainer, batch: Batch) -> None:
    losses = [trainer.train_step(batch, total_steps=100) for _ in range(8)]
    assert losses[-1][0] < 0.95 * losses[0][0]
    assert losses[-1][1] < 0.9 * losses[0][1]


def test_a_restored_trainer_takes_the_same_step(
    trainer: Trainer, batch: Batch, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    trainer.train_step(batch, total_steps=10)
    trainer.save(tmp_path / "state.safetensors")
    toy = demo_model.build_model(trainer.model.config, seed=2)
    other = Trainer(toy, 3e-3, name_ids(tokenizer))
    other.restore(tmp_path / "state.safetensors")
    assert other.step == trainer.step == 1
    assert [trainer.train_step(batch, 10) for _ in range(2)] == [
        other.train_step(batch, 10) for _ in range(2)
    ]


def test_training_may_start_from_an_exported_checkpoint(
    trainer: Trainer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    demo_model.export_model(trainer.model, tokenizer, tmp_path)
    other = demo_model.build_model(trainer.model.config, seed=2)

    demo_model.load_weights(other, tmp_path)

    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.bfloat16().float()), name


def test_the_schedule_warms_up_and_then_falls() -> None:
    rates = [schedule(step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02


def test_an_export_is_read_by_transformers_and_answers(
    trainer: Trainer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    demo_model.export_model(trainer.model, tokenizer, tmp_path)
    question = make_questions("which_picture", 1, seed=1)[0]
    answerer = LocalAnswerer(tmp_path)
    assert isinstance(answerer.answer(question), str)


def test_pixels_equal_those_of_the_hub_processor(
    trainer: Trainer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    demo_model.export_model(trainer.model, tokenizer, tmp_path)
    processor = AutoProcessor.from_pretrained(str(tmp_path))  # type: ignore[no-untyped-call]
    picture = render_scene(sample_scene(Random(4), 2))
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    expected = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    got = pixels.patchify(pixels.resize_picture(pixels.decode_picture(buffer.getvalue())))
    assert torch.allclose(got, expected, atol=1e-6)
