"""Make the training data on the fly: sample ``i`` of seed ``s`` is always the same.

A sample is one or several pictures with questions and answers about them. Batches are cut from a
pool that is sorted by length, so that little is padded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset

from . import phrases
from .conversation import IGNORED, ConversationWriter, TokenSequence
from .pixels import CELL, decode_picture, resize_picture
from .questions import Turn, ask_about_clip, ask_about_pictures, ask_about_scene, small_talk
from .render import encode_picture, render_labels, render_scene
from .scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    Scene,
    sample_clip,
    sample_scene,
)

LABEL_SCALE = 8
MIN_COVER = 0.1
BACKGROUND_NAMES = (*BACKGROUNDS, *PATTERNS[1:])
NUM_CLASSES = (
    1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES), 1 + len(CELLS), 3, len(BACKGROUND_NAMES),
)  # fmt: skip
SPARSE_READOUTS = (0, 1, 2, 3, 4)
MAX_ROWS = 10
MAX_PICTURES = 4
# Row, column, place of the item and number of the picture: read inside the language model.
PLACE_CLASSES = (MAX_ROWS, MAX_ROWS, 1 + len(CELLS), MAX_PICTURES)
PLACE_COLUMNS = (6, 7, 3, 8)
NUM_LABELS = len(NUM_CLASSES) + 3
POOL_BATCHES = 8


@dataclass(slots=True)
class Sample:
    """Resized pictures, what their cells show, and the tokens of the questions about them."""

    pictures: list[torch.Tensor]
    cell_labels: list[torch.Tensor]
    tokens: TokenSequence


@dataclass(slots=True)
class Batch:
    """Tensors of one training step.

    Attributes:
        pictures: Resized pixels in order of rows. Each [3, height, width], uint8.
        cell_labels: Classes of all merged cells. [num_cells, NUM_LABELS], int64.
        token_ids: [batch, length], int64.
        positions: [3, batch, length], int64.
        mask: True where a token sees another. [batch, 1, length, length], bool.
        targets: Token to predict at each place, or ``IGNORED``. [batch, length], int64.
    """

    pictures: list[torch.Tensor]
    cell_labels: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor


class DemoDataset(IterableDataset[Batch]):
    """Endless batches, from batch ``first`` on, as a function of the seed."""

    def __init__(self, tokenizer_json: str, seed: int, batch_size: int, first: int = 0) -> None:
        super().__init__()
        self._tokenizer_json = tokenizer_json
        self._seed = seed
        self._batch_size = batch_size
        self._first = first

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches in order of step."""
        tokenizer = Tokenizer.from_str(self._tokenizer_json)
        pool_index, skipped = divmod(self._first, POOL_BATCHES)
        while True:
            batches = self._make_pool(tokenizer, pool_index)
            yield from batches[skipped:]
            pool_index, skipped = pool_index + 1, 0

    def _make_pool(self, tokenizer: Tokenizer, pool_index: int) -> list[Batch]:
        size = POOL_BATCHES * self._batch_size
        first = pool_index * size
        samples = [
            make_sample(tokenizer, Random(f"train/{self._seed}/{index}"))
            for index in range(first, first + size)
        ]
        samples.sort(key=lambda sample: len(sample.tokens.token_ids))
        cuts = range(0, size, self._batch_size)
        groups = [samples[cut : cut + self._batch_size] for cut in cuts]
        Random(f"pool/{self._seed}/{pool_index}").shuffle(groups)
        return [collate(group) for group in groups]


def make_sample(tokenizer: Tokenizer, rng: Random) -> Sample:
    """Draw pictures and questions about them, as one training sample."""
    draw = rng.random()
    if draw < 0.03:
        return _small_talk_sample(tokenizer, rng)
    if draw < 0.12:
        frames, direction = sample_clip(rng, rng.choice((3, 3, 4)))
        turns = [ask_about_clip(frames, direction, rng) for _ in range(2)]
        return _write_sample(tokenizer, rng, frames, turns)
    if draw < 0.35:
        scenes = sample_pictures(rng, rng.choice((2, 2, 2, 3)))
        turns = [ask_about_pictures(scenes, rng) for _ in range(3)]
        return _write_sample(tokenizer, rng, scenes, turns)
    scene = sample_scene(rng, sample_num_items(rng))
    turns = [ask_about_scene(scene, rng) for _ in range(4)]
    return _write_sample(tokenizer, rng, [scene], turns)


def sample_num_items(rng: Random) -> int:
    """Draw how many shapes a picture shows: one is as likely as two to five together."""
    return 1 if rng.random() < 0.3 else rng.randint(2, 5)


def sample_pictures(rng: Random, number: int, held_out: bool = False) -> list[Scene]:
    """Draw pictures of one shape each, at times all of one shape or colour."""
    while True:
        scenes = [sample_scene(rng, 1, held_out) for _ in range(number)]
        items = [scene.items[0] for scene in scenes]
        same_shape = len({item.shape for item in items}) == 1
        same_colour = len({item.colour for item in items}) == 1
        wants = rng.choice(("any", "any", "shape", "colour"))
        fits = {"any": True, "shape": same_shape, "colour": same_colour}[wants]
        if fits and not (same_shape and same_colour):
            return scenes


def label_cells(scene: Scene, rows: int, columns: int, index: int = 0) -> torch.Tensor:
    """Name what each merged cell of a resized picture shows.

    Returns:
        One class per read-out of ``NUM_CLASSES``: shape, colour, size and place of the item that
        covers most of the cell (0 if none does), number of item centres in it, background; then
        the cell's row and column and the picture's index. [rows * columns, NUM_LABELS], int64.
    """
    label_map = render_labels(scene, columns * LABEL_SCALE, rows * LABEL_SCALE)
    blocks = label_map.reshape(rows, LABEL_SCALE, columns, LABEL_SCALE).transpose(0, 2, 1, 3)
    tiles = blocks.reshape(rows * columns, -1)
    background = BACKGROUND_NAMES.index(scene.background.name)
    cover = [(tiles == number + 1).mean(axis=1) for number in range(len(scene.items))]
    labels = []
    for cell in range(rows * columns):
        best = max(range(len(cover)), key=lambda number: float(cover[number][cell]))
        at = (min(MAX_ROWS - 1, cell // columns), min(MAX_ROWS - 1, cell % columns))
        row = [0, 0, 0, 0, 0, background, *at, index]
        if cover[best][cell] >= MIN_COVER:
            item = scene.items[best]
            row[:4] = [
                1 + SHAPES.index(item.shape), 1 + tuple(COLOURS).index(item.colour),
                1 + tuple(SIZES).index(item.size), 1 + item.cell,
            ]  # fmt: skip
        labels.append(row)
    for item in scene.items:
        cell = min(rows - 1, int(item.y * rows)) * columns + min(columns - 1, int(item.x * columns))
        labels[cell][4] = min(2, labels[cell][4] + 1)
    return torch.tensor(labels)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples to the longest and build the mask that keeps their segments apart."""
    length = max(len(sample.tokens.token_ids) for sample in samples)
    token_ids = torch.zeros(len(samples), length, dtype=torch.long)
    positions = torch.zeros(3, len(samples), length, dtype=torch.long)
    segments = torch.full((len(samples), length), -1)
    targets = torch.full((len(samples), length), IGNORED)
    for row, sample in enumerate(samples):
        tokens = sample.tokens
        used = len(tokens.token_ids)
        token_ids[row, :used] = torch.tensor(tokens.token_ids)
        positions[:, row, :used] = torch.tensor(tokens.positions).T
        segments[row, :used] = torch.tensor(tokens.segments)
        targets[row, : used - 1] = torch.tensor(tokens.targets[1:])
    key, query = segments[:, None, :], segments[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((key == 0) | (key == query))
    return Batch(
        pictures=[picture for sample in samples for picture in sample.pictures],
        cell_labels=_concatenate([labels for sample in samples for labels in sample.cell_labels]),
        token_ids=token_ids,
        positions=positions,
        mask=mask[:, None],
        targets=targets,
    )


def _concatenate(labels: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(labels) if labels else torch.zeros(0, NUM_LABELS, dtype=torch.long)


def _small_talk_sample(tokenizer: Tokenizer, rng: Random) -> Sample:
    writer = ConversationWriter(tokenizer)
    if rng.random() < 0.3:
        writer.add_system(rng.choice(phrases.SYSTEM))
    writer.open_user()
    for _ in range(4):
        writer.start_segment()
        turn = small_talk(rng)
        writer.add_question(turn.question)
        writer.add_answer(turn.answer)
    return Sample([], [], writer.sequence)


def _write_sample(
    tokenizer: Tokenizer, rng: Random, scenes: Sequence[Scene], turns: Sequence[Turn]
) -> Sample:
    pictures = [_load_picture(scene, rng) for scene in scenes]
    grids = [(picture.shape[1] // CELL, picture.shape[2] // CELL) for picture in pictures]
    labels = [
        label_cells(scene, *grid, index)
        for index, (scene, grid) in enumerate(zip(scenes, grids, strict=True))
    ]
    writer = ConversationWriter(tokenizer)
    if rng.random() < 0.15:
        writer.add_system(rng.choice(phrases.SYSTEM))
    writer.open_user()
    draw = rng.random()
    if draw < 0.22:
        _write_question_first(writer, grids, turns[: rng.randint(1, 3)])
    else:
        writer.add_pictures(grids)
        turns_per_segment = 3 if draw < 0.37 else 1
        _write_segments(writer, turns, turns_per_segment)
    return Sample(pictures, labels, writer.sequence)


def _write_question_first(
    writer: ConversationWriter, grids: Sequence[tuple[int, int]], turns: Sequence[Turn]
) -> None:
    writer.add_question(turns[0].question)
    writer.add_pictures(grids)
    writer.add_answer(turns[0].answer)
    for turn in turns[1:]:
        writer.close_turn()
        writer.open_user()
        writer.add_question(turn.question)
        writer.add_answer(turn.answer)


def _write_segments(writer: ConversationWriter, turns: Sequence[Turn], per_segment: int) -> None:
    for index, turn in enumerate(turns):
        if index % per_segment == 0:
            writer.start_segment()
        else:
            writer.close_turn()
            writer.open_user()
        writer.add_question(turn.question)
        writer.add_answer(turn.answer)


def _load_picture(scene: Scene, rng: Random) -> torch.Tensor:
    data, _ = encode_picture(render_scene(scene), rng)
    return resize_picture(decode_picture(data))
