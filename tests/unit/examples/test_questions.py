"""Questions of the demo model: every answer agrees with the scene that it is about."""

from random import Random

import pytest

from examples.demo_model import phrases
from examples.demo_model.questions import (
    ASKERS,
    NUMBERS,
    ORDINALS,
    Turn,
    ask_about_clip,
    ask_about_pictures,
    ask_kind,
    describe,
    small_talk,
)
from examples.demo_model.scenes import COLOURS, Background, Item, Scene, sample_clip, sample_scene

WHITE = Background("white", "plain", (255, 255, 255), (255, 255, 255), 0)


def item_of(colour: str, shape: str, cell: int) -> Item:
    return Item(shape, colour, "small", cell, 0.5, 0.5, 0.1, 0.0, COLOURS[colour])


def answer_to(scene: Scene, rng: Random, kind: str) -> Turn:
    turn = ask_kind(scene, rng, kind)
    assert turn is not None
    return turn


def scene_of(*items: Item) -> Scene:
    return Scene(100, 100, WHITE, items)


@pytest.mark.parametrize("kind", ASKERS)
def test_every_kind_of_question_can_be_asked_about_one_shape(kind: str) -> None:
    turn = answer_to(scene_of(item_of("red", "star", 0)), Random(2), kind)
    assert turn.question
    assert turn.answer.endswith(".")


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("colour", {"The shape is red.", "The star is red."}),
        ("shape", {"It is a star.", "The red shape is a star."}),
        ("what", {"It is a red star."}),
        ("count", {"There is one shape."}),
        ("describe", {"A small red star on a white background, in the top left."}),
        ("background", {"The background is white."}),
    ],
)
def test_answers_about_one_shape_are_these_sentences(kind: str, answers: set[str]) -> None:
    scene = scene_of(item_of("red", "star", 0))
    rng = Random(4)
    assert {answer_to(scene, rng, kind).answer for _ in range(30)} == answers


def test_positions_name_the_cell_of_the_item_asked_for() -> None:
    scene = scene_of(item_of("red", "star", 1), item_of("blue", "circle", 8))
    rng = Random(5)
    for _ in range(20):
        turn = answer_to(scene, rng, "position")
        place = "at the top" if "star" in turn.question else "in the bottom right"
        assert turn.answer.endswith(f" is {place}.")


def test_counts_are_the_number_of_items() -> None:
    rng = Random(6)
    for number in range(2, 6):
        scene = sample_scene(rng, number)
        answer = answer_to(scene, rng, "count").answer
        assert answer == f"There are {NUMBERS[number]} shapes."


def test_a_scene_without_a_unique_shape_has_no_question_for_its_colour() -> None:
    scene = scene_of(item_of("red", "star", 0), item_of("blue", "star", 8))
    assert ask_kind(scene, Random(1), "colour") is None


def test_orange_takes_an() -> None:
    scene = scene_of(item_of("orange", "heart", 4))
    assert answer_to(scene, Random(1), "what").answer == "It is an orange heart."


def test_several_shapes_are_described_in_reading_order() -> None:
    scene = scene_of(item_of("blue", "cross", 8), item_of("red", "star", 0))
    expected = (
        "Two shapes on a white background: "
        "a red star in the top left and a blue cross in the bottom right."
    )
    assert describe(scene) == expected


def test_which_picture_names_the_only_picture_that_fits() -> None:
    rng = Random(7)
    pictures = [scene_of(item_of("red", "star", 0)), scene_of(item_of("red", "cross", 0))]
    for _ in range(20):
        turn = ask_about_pictures(pictures, rng, "which_picture")
        index = 0 if "star" in turn.question else 1
        assert turn.answer == f"The {ORDINALS[index]} picture."


def test_motion_is_answered_with_the_direction_of_the_clip() -> None:
    rng = Random(8)
    for _ in range(20):
        frames, direction = sample_clip(rng, 3)
        turn = ask_about_clip(frames, direction, rng)
        if turn.kind == "motion":
            words = "does not move" if direction == "still" else direction
            assert words in turn.answer


def test_rewording_keeps_the_question_recognisable() -> None:
    rng = Random(9)
    wordings = {phrases.reword("What color is the shape?", rng) for _ in range(200)}
    assert {"What colour is the shape?", "what color is the shape", "What color is the shape?"} < (
        wordings
    )


def test_small_talk_has_one_answer_per_question() -> None:
    answers = dict(phrases.SMALL_TALK)
    assert len(answers) == len(phrases.SMALL_TALK)
    assert small_talk(Random(1)).answer in answers.values()
