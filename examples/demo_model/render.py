"""Turn a scene into pixels, and pixels into the bytes of a picture file.

The same scene gives the same bytes: every random detail (noise, stripe direction) comes from seeds
that the scene carries.
"""

import io
import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .scenes import Background, Item, Scene

OVERSAMPLING = 2
FORMATS = ("PNG", "JPEG", "WEBP")
Point = tuple[float, float]


def render_scene(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB picture of its own width and height."""
    scale = OVERSAMPLING if max(scene.width, scene.height) < 500 else 1
    width, height = scene.width * scale, scene.height * scale
    picture = _draw_background(scene.background, width, height)
    draw = ImageDraw.Draw(picture)
    for item in scene.items:
        _draw_shape(draw, item, (width, height), item.rgb)
    if scale == 1:
        return picture
    return picture.resize((scene.width, scene.height), Image.Resampling.BOX)


def render_labels(scene: Scene, width: int, height: int) -> np.ndarray:
    """Draw which item covers each pixel of a ``width`` x ``height`` map.

    Returns:
        0 for background, else 1 + the item's index. [height, width], uint8.
    """
    label_map = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(label_map)
    for index, item in enumerate(scene.items):
        _draw_shape(draw, item, (width, height), index + 1, scene.width / scene.height)
    return np.asarray(label_map)


def encode_picture(picture: Image.Image, rng: Random) -> tuple[bytes, str]:
    """Save the picture as PNG, JPEG or WebP by chance.

    Returns:
        The file's bytes and its MIME type.
    """
    chosen = rng.choice(FORMATS)
    buffer = io.BytesIO()
    if chosen == "PNG":
        picture.save(buffer, "PNG", compress_level=1)
    elif chosen == "JPEG":
        picture.save(buffer, "JPEG", quality=rng.randint(70, 96))
    else:
        picture.save(buffer, "WEBP", quality=rng.randint(70, 96), method=0)
    return buffer.getvalue(), f"image/{chosen.lower()}"


def outline(item: Item, sides: Point) -> list[Point]:
    """Return the corners of an item in pixels, as a polygon.

    Args:
        item: The shape; a circle becomes a polygon of many corners.
        sides: Length in pixels of its radius, along x and along y.
    """
    turn = math.radians(item.angle)
    corners = []
    for x, y in _unit_corners(item.shape):
        turned_x = x * math.cos(turn) - y * math.sin(turn)
        turned_y = x * math.sin(turn) + y * math.cos(turn)
        corners.append((turned_x * sides[0], turned_y * sides[1]))
    return corners


def _unit_corners(shape: str) -> list[Point]:
    if shape == "circle":
        return [_on_circle(index / 40, 0.95) for index in range(40)]
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [_on_circle(-0.25 + index / 3, 1.0) for index in range(3)]
    if shape == "star":
        radii = (1.0, 0.42)
        return [_on_circle(-0.25 + index / 10, radii[index % 2]) for index in range(10)]
    if shape == "cross":
        arm, end = 0.3, 0.95
        return [
            (-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm),
            (arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm),
        ]  # fmt: skip
    return [_on_heart(index / 48) for index in range(48)]


def _on_circle(turn: float, radius: float) -> Point:
    return radius * math.cos(2 * math.pi * turn), radius * math.sin(2 * math.pi * turn)


def _on_heart(turn: float) -> Point:
    """Return a point of the classic heart curve, scaled to the unit circle."""
    angle = 2 * math.pi * turn
    x = 16 * math.sin(angle) ** 3
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle)
    return x / 17, -(y - math.cos(4 * angle) + 2.5) / 17


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    item: Item,
    picture_size: tuple[int, int],
    fill: tuple[int, int, int] | int,
    aspect: float | None = None,
) -> None:
    """Fill one item; ``aspect`` is that of the scene where the map has another one."""
    width, height = picture_size
    aspect = aspect or width / height
    side_x = item.radius * width * (1.0 if aspect < 1 else 1 / aspect)
    side_y = item.radius * height * (aspect if aspect < 1 else 1.0)
    centre_x, centre_y = item.x * width, item.y * height
    corners = outline(item, (side_x, side_y))
    draw.polygon([(centre_x + x, centre_y + y) for x, y in corners], fill=fill)


def _draw_background(background: Background, width: int, height: int) -> Image.Image:
    first, second = (np.array(rgb, np.float32) for rgb in (background.rgb, background.rgb_second))
    if background.pattern == "plain":
        return Image.new("RGB", (width, height), background.rgb)
    mix = _pattern(background, width, height)[..., None]
    pixels = first * (1 - mix) + second * mix
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def _pattern(background: Background, width: int, height: int) -> np.ndarray:
    """Return how much of the second tone each pixel has. [height, width], float32, 0 to 1."""
    rng = np.random.default_rng(background.seed)
    x = np.arange(width, dtype=np.float32)[None, :] / min(width, height)
    y = np.arange(height, dtype=np.float32)[:, None] / min(width, height)
    tile = rng.uniform(0.08, 0.16)
    if background.pattern == "striped":
        turn = rng.choice([0.0, 0.25, 0.5, 0.75]) * math.pi
        along = x * math.cos(turn) + y * math.sin(turn)
        return (np.floor(along / tile) % 2).astype(np.float32)
    if background.pattern == "checkered":
        return ((np.floor(x / tile) + np.floor(y / tile)) % 2).astype(np.float32)
    if background.pattern == "shaded":
        turn = rng.uniform(0, 2 * math.pi)
        along = x * math.cos(turn) + y * math.sin(turn)
        shade = along - along.min()
        return np.asarray(shade / max(1e-6, float(shade.max())), np.float32)
    coarse = rng.random((12, 12), dtype=np.float32)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.random((height, width), dtype=np.float32)
    mixed = 0.6 * np.asarray(smooth) + 0.4 * grain
    return np.clip(mixed, 0, 1).astype(np.float32)
