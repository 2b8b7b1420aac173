"""Train the demo model on the CPU; stop and start again at will.

``python -m examples.demo_model.train --work DIR --steps N --export models/demo`` goes on from the
newest state in ``DIR``. The data of step ``i`` and the first weights follow from ``--seed``.
"""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from . import phrases
from .dataset import DemoDataset, sample_num_items, sample_pictures
from .model import build_config, build_model, export_model, load_weights
from .questions import ask_about_clip, ask_about_pictures, ask_about_scene
from .scenes import sample_clip, sample_scene
from .tokenizer import load_tokenizer, name_ids, train_tokenizer
from .trainer import Trainer
from .validate import validate

log = logging.getLogger("demo_train")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a run needs to know; ``vision_steps`` steps train the tower alone, without text."""

    work: Path
    export: Path
    steps: int
    vision_steps: int
    batch_size: int
    learning_rate: float
    seed: int
    eval_seconds: float
    use_bfloat16: bool
    freezes_tower: bool
    start_from: Path | None


def sample_texts(seed: int, number: int) -> list[str]:
    """Write down questions and answers for the tokenizer to learn from."""
    texts = [text for pair in phrases.SMALL_TALK for text in pair] * 6
    texts += [*phrases.SYSTEM, "user\n", "assistant\n", "system\n"] * 60
    for index in range(number):
        rng = Random(f"texts/{seed}/{index}")
        scene = sample_scene(rng, sample_num_items(rng))
        pictures = sample_pictures(rng, 2)
        frames, direction = sample_clip(rng, 3)
        for turn in (
            ask_about_scene(scene, rng),
            ask_about_pictures(pictures, rng),
            ask_about_clip(frames, direction, rng),
        ):
            texts += [turn.question, turn.answer]
    return texts


def train(settings: TrainSettings) -> None:
    """Run until ``settings.steps``, saving and measuring every ``settings.eval_seconds``."""
    settings.work.mkdir(parents=True, exist_ok=True)
    tokenizer = _prepare_tokenizer(settings)
    model = build_model(build_config(tokenizer), settings.seed)
    if settings.start_from is not None:
        load_weights(model, settings.start_from)
    words = name_ids(tokenizer)
    trainer = Trainer(
        model, settings.learning_rate, words, settings.use_bfloat16, settings.freezes_tower
    )
    state_path = settings.work / "state.safetensors"
    if state_path.exists():
        trainer.restore(state_path)
        log.info("resumed at step %d", trainer.step)
    dataset = DemoDataset(tokenizer.to_str(), settings.seed, settings.batch_size, trainer.step)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=24)
    last_saved, started, first_step = time.monotonic(), time.monotonic(), trainer.step
    text_mean = cell_mean = 0.0
    for batch in loader:
        if trainer.step >= settings.steps:
            break
        with_text = trainer.step >= settings.vision_steps
        losses = trainer.train_step(batch, settings.steps, with_text)
        text_mean += 0.02 * (losses[0] - text_mean)
        cell_mean += 0.02 * (losses[1] - cell_mean)
        if trainer.step % 50 == 0:
            pace = (time.monotonic() - started) / (trainer.step - first_step)
            log.info(
                "step %d text %.4f cells %.4f %.3f s/step", trainer.step, text_mean, cell_mean, pace
            )
        if time.monotonic() - last_saved > settings.eval_seconds:
            trainer.save(state_path)
            if with_text:
                _evaluate(trainer, tokenizer)
            last_saved = time.monotonic()
    trainer.save(state_path)
    export_model(model, tokenizer, settings.export)


def _prepare_tokenizer(settings: TrainSettings) -> Tokenizer:
    path = settings.work / "tokenizer.json"
    if settings.start_from is not None:
        return load_tokenizer(settings.start_from)
    if not path.exists():
        train_tokenizer(sample_texts(settings.seed, 4000)).save(str(path))
    return load_tokenizer(settings.work)


def _evaluate(trainer: Trainer, tokenizer: Tokenizer) -> None:
    accuracy = validate(trainer.model, tokenizer, num_per_kind=40, seed=1)
    table = " ".join(f"{kind}={part:.2f}" for kind, part in accuracy.items())
    log.info("step %d held out: %s", trainer.step, table)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Folder of the run's state.")
    parser.add_argument("--export", type=Path, required=True, help="Folder of the checkpoint.")
    parser.add_argument("--steps", type=int, default=9000, help="Length of the whole run.")
    parser.add_argument("--vision-steps", type=int, default=2000, help="Steps of the tower alone.")
    parser.add_argument("--batch-size", type=int, default=32, help="Samples per step.")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3, help="Peak of the schedule.")
    parser.add_argument("--seed", type=int, default=7, help="Seed of data and first weights.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch.")
    parser.add_argument("--eval-seconds", type=float, default=480.0, help="Pause between tables.")
    parser.add_argument("--use-bfloat16", action="store_true", help="Products in bfloat16.")
    parser.add_argument("--freezes-tower", action="store_true", help="Train the text part only.")
    parser.add_argument(
        "--start-from", type=Path, help="Checkpoint that gives tokenizer and first weights."
    )
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.pop("threads"))
    train(TrainSettings(**arguments))


if __name__ == "__main__":
    main()
