"""Scenes of the demo model: determinism, clear places, and the split that training respects."""

import math
from random import Random

import pytest

from examples.demo_model.held_out import KINDS, make_questions
from examples.demo_model.scenes import (
    CELL_CENTRES,
    COLOURS,
    MIN_CONTRAST,
    SHAPES,
    Scene,
    cell_of,
    is_held_out,
    sample_clip,
    sample_scene,
)


def scenes(number: int, held_out: bool = False) -> list[Scene]:
    rng = Random(3)
    return [sample_scene(rng, 1 + index % 5, held_out) for index in range(number)]


def test_the_same_seed_gives_the_same_scene() -> None:
    assert scenes(5) == scenes(5)


def test_training_scenes_show_no_held_out_combination() -> None:
    for scene in scenes(100):
        assert not any(is_held_out(item.shape, item.colour, item.cell) for item in scene.items)


def test_held_out_scenes_start_with_a_held_out_combination() -> None:
    for scene in scenes(40, held_out=True):
        first = scene.items[0]
        assert is_held_out(first.shape, first.colour, first.cell)


def test_about_a_tenth_of_the_combinations_is_held_out() -> None:
    all_of_them = [
        is_held_out(shape, colour, cell)
        for shape in SHAPES
        for colour in COLOURS
        for cell in range(len(CELL_CENTRES) ** 2)
    ]
    assert 0.05 < sum(all_of_them) / len(all_of_them) < 0.15


def test_items_lie_in_their_cells_and_apart_from_each_other() -> None:
    for scene in scenes(60):
        short = min(scene.width, scene.height)
        for index, item in enumerate(scene.items):
            assert cell_of(item.x, item.y) == item.cell
            for other in scene.items[:index]:
                gap_x = (item.x - other.x) * scene.width / short
                gap_y = (item.y - other.y) * scene.height / short
                assert math.hypot(gap_x, gap_y) > item.radius + other.radius


def test_items_stand_out_from_a_plain_background() -> None:
    for scene in scenes(60):
        for item in scene.items:
            assert math.dist(item.rgb, scene.background.rgb) >= MIN_CONTRAST


def test_a_clip_moves_its_shape_the_way_it_says() -> None:
    rng = Random(5)
    for _ in range(20):
        frames, direction = sample_clip(rng, 3)
        first, last = frames[0].items[0], frames[-1].items[0]
        expected = {
            "right": last.x - first.x > 0.35,
            "left": first.x - last.x > 0.35,
            "down": last.y - first.y > 0.35,
            "up": first.y - last.y > 0.35,
            "still": (last.x, last.y) == (first.x, first.y),
        }
        assert expected[direction]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "small_talk"])
def test_every_held_out_question_shows_something_unseen(kind: str) -> None:
    for question in make_questions(kind, 4, seed=11):
        items = [item for scene in question.scenes for item in scene.items]
        assert any(is_held_out(item.shape, item.colour, item.cell) for item in items)
