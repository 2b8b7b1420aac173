"""Pictures of the demo model: the same scene gives the same bytes, and what it says is seen."""

import io
from random import Random

import numpy as np
import pytest
from PIL import Image

from examples.demo_model.dataset import BACKGROUND_NAMES, label_cells
from examples.demo_model.render import encode_picture, render_labels, render_scene
from examples.demo_model.scenes import COLOURS, SHAPES, Background, Item, Scene, sample_scene

WHITE = Background("white", "plain", (255, 255, 255), (255, 255, 255), 0)


def scene_of(shape: str, width: int = 120, height: int = 90) -> Scene:
    item = Item(shape, "red", "medium", 4, 0.5, 0.5, 0.18, 0.0, (220, 30, 35))
    return Scene(width, height, WHITE, (item,))


def test_rendering_is_deterministic() -> None:
    scene = sample_scene(Random(1), 3)
    assert render_scene(scene).tobytes() == render_scene(scene).tobytes()


def test_the_picture_has_the_size_of_the_scene() -> None:
    assert render_scene(scene_of("star", 133, 77)).size == (133, 77)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_is_drawn_at_its_place_in_its_colour(shape: str) -> None:
    pixels = np.asarray(render_scene(scene_of(shape)))
    assert tuple(pixels[45, 60]) == (220, 30, 35)
    assert tuple(pixels[2, 2]) == (255, 255, 255)


def test_no_two_shapes_look_the_same() -> None:
    pictures = {render_scene(scene_of(shape)).tobytes() for shape in SHAPES}
    assert len(pictures) == len(SHAPES)


def test_labels_cover_what_the_picture_shows() -> None:
    scene = scene_of("square")
    is_red = np.asarray(render_scene(scene))[..., 1] < 128
    is_labelled = render_labels(scene, scene.width, scene.height) == 1
    assert (is_red == is_labelled).mean() > 0.98


def test_a_cell_is_labelled_with_the_item_that_covers_it() -> None:
    labels = label_cells(scene_of("heart"), 5, 5)
    middle, corner = labels[12].tolist(), labels[0].tolist()
    background = BACKGROUND_NAMES.index("white")
    colour = 1 + tuple(COLOURS).index("red")
    assert middle == [1 + SHAPES.index("heart"), colour, 2, 5, 1, background, 2, 2, 0]
    assert corner == [0, 0, 0, 0, 0, background, 0, 0, 0]


def test_files_come_in_three_formats_and_decode_to_the_same_size() -> None:
    picture = render_scene(scene_of("cross"))
    files = [encode_picture(picture, Random(seed)) for seed in range(12)]
    assert {mime for _, mime in files} == {"image/png", "image/jpeg", "image/webp"}
    assert {Image.open(io.BytesIO(data)).size for data, _ in files} == {(120, 90)}
