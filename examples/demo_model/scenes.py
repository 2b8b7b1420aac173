"""Sample scenes of coloured shapes and decide which of them training may see.

A scene is a plain description (sizes, positions, colours), without a pixel. Positions are
fractions of the picture, ``x`` to the right and ``y`` downwards; radii are fractions of its shorter
side. Every item sits clearly inside one cell of a 3x3 grid, so that "Where is the star?" has one
right answer.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 155, 60),
    "blue": (35, 75, 215),
    "yellow": (245, 220, 40),
    "orange": (245, 135, 20),
    "purple": (135, 45, 165),
    "black": (18, 18, 20),
    "white": (250, 250, 250),
    "grey": (130, 130, 132),
}
CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
SIZES = {"small": (0.10, 0.122), "medium": (0.155, 0.19), "large": (0.235, 0.28)}
BACKGROUNDS = {
    "white": (254, 254, 254),
    "black": (12, 12, 14),
    "grey": (190, 190, 192),
    "light blue": (175, 210, 245),
    "light green": (190, 235, 190),
    "light yellow": (253, 246, 190),
    "pink": (250, 195, 210),
    "dark blue": (20, 30, 80),
}
PATTERNS = ("plain", "striped", "checkered", "textured", "shaded")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
CELL_CENTRES = (0.2, 0.5, 0.8)
MIN_CONTRAST = 125.0
MAX_ITEMS = 5
HELD_OUT_PERCENT = 10


@dataclass(frozen=True, slots=True)
class Item:
    """One shape of a scene; ``x``, ``y`` and ``radius`` are fractions of the picture."""

    shape: str
    colour: str
    size: str
    cell: int
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind the shapes: a named base colour and a pattern drawn in two tones."""

    colour: str
    pattern: str
    rgb: tuple[int, int, int]
    rgb_second: tuple[int, int, int]
    seed: int

    @property
    def name(self) -> str:
        """Say it in a word: the colour of a plain background, else its pattern."""
        return self.colour if self.pattern == "plain" else self.pattern


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: its pixel size, its background and one to five items that do not overlap."""

    width: int
    height: int
    background: Background
    items: tuple[Item, ...]


def is_held_out(shape: str, colour: str, cell: int) -> bool:
    """Tell whether training must never see this shape in this colour at this place."""
    digest = hashlib.sha256(f"{shape}/{colour}/{cell}".encode()).digest()
    return digest[0] * 100 // 256 < HELD_OUT_PERCENT


def sample_scene(rng: Random, num_items: int, held_out: bool = False) -> Scene:
    """Draw a scene.

    Args:
        rng: Source of chance; the scene is a function of its state.
        num_items: Number of shapes, 1 to ``MAX_ITEMS``.
        held_out: Whether the scene is for evaluation: then its first item is a combination of
            shape, colour and place that training never shows; else no item is.

    Returns:
        The scene.
    """
    width, height = sample_picture_size(rng)
    background = sample_background(rng)
    while True:
        items = _place_items(rng, num_items, background, (width, height), held_out)
        if items is not None:
            return Scene(width, height, background, items)


def sample_picture_size(rng: Random) -> tuple[int, int]:
    """Draw width and height in pixels: thumbnails to camera pictures, upright to wide."""
    short = round(math.exp(rng.uniform(math.log(72), math.log(400))))
    if rng.random() < 0.03:
        short = rng.randint(480, 900)
    aspect = rng.choice((1.0, 1.0, 4 / 3, 3 / 2, 16 / 9, rng.uniform(1.0, 1.85)))
    long = round(short * aspect)
    return (short, long) if rng.random() < 0.35 else (long, short)


def sample_background(rng: Random) -> Background:
    """Draw a background; half of them are plain and a third of those white."""
    colour = "white" if rng.random() < 0.3 else rng.choice(tuple(BACKGROUNDS))
    pattern = "plain" if rng.random() < 0.55 else rng.choice(PATTERNS[1:])
    rgb = _jitter(rng, BACKGROUNDS[colour], 4)
    shift = rng.choice((-1, 1)) * rng.uniform(22, 40)
    if max(rgb) > 215:
        shift = -abs(shift)
    elif max(rgb) < 60:
        shift = abs(shift)
    second = _clamp(tuple(channel + shift for channel in rgb))
    return Background(colour, pattern, rgb, second, rng.getrandbits(30))


def sample_clip(rng: Random, num_frames: int, held_out: bool = False) -> tuple[list[Scene], str]:
    """Draw the frames of one shape that moves steadily, and the name of its direction.

    Args:
        rng: Source of chance.
        num_frames: Number of frames, at least 2.
        held_out: As in ``sample_scene``, for the first frame's item.

    Returns:
        The frames in order of time, and a key of ``DIRECTIONS``.
    """
    while True:
        direction = rng.choice(tuple(DIRECTIONS))
        frames = _sample_frames(rng, num_frames, direction, held_out)
        items = [frame.items[0] for frame in frames]
        unseen = [is_held_out(item.shape, item.colour, item.cell) for item in items]
        if any(unseen) == held_out:
            return frames, direction


def cell_of(x: float, y: float) -> int:
    """Return the index in ``CELLS`` of a point of the picture."""
    return 3 * min(2, int((y - 0.05) / 0.3)) + min(2, int((x - 0.05) / 0.3))


def _sample_frames(rng: Random, num_frames: int, direction: str, held_out: bool) -> list[Scene]:
    scene = sample_scene(rng, 1, held_out)
    while scene.items[0].size == "large":
        scene = sample_scene(rng, 1, held_out)
    item = scene.items[0]
    step_x, step_y = DIRECTIONS[direction]
    path = 0.0 if direction == "still" else rng.uniform(0.4, 0.56)
    start_x = item.x if not step_x else 0.5 - step_x * path / 2 + rng.uniform(-0.04, 0.04)
    start_y = item.y if not step_y else 0.5 - step_y * path / 2 + rng.uniform(-0.04, 0.04)
    frames = []
    for index in range(num_frames):
        done = path * index / (num_frames - 1)
        x, y = start_x + step_x * done, start_y + step_y * done
        frames.append(replace(scene, items=(replace(item, x=x, y=y, cell=cell_of(x, y)),)))
    return frames


def _place_items(
    rng: Random,
    num_items: int,
    background: Background,
    picture_size: tuple[int, int],
    held_out: bool,
) -> tuple[Item, ...] | None:
    items: list[Item] = []
    cells = rng.sample(range(9), num_items)
    same_shape = rng.choice(SHAPES) if rng.random() < 0.15 else None
    same_colour = rng.choice(tuple(COLOURS)) if rng.random() < 0.15 else None
    for cell in cells:
        wants_held_out = held_out and not items
        for _ in range(40):
            shape = same_shape if same_shape and not wants_held_out else rng.choice(SHAPES)
            colour = same_colour if same_colour and not wants_held_out else None
            item = _sample_item(rng, (shape, colour), cell, num_items, picture_size)
            if item is None or not _has_contrast(item.rgb, background):
                continue
            if not held_out and is_held_out(item.shape, item.colour, cell):
                continue
            if wants_held_out and not is_held_out(item.shape, item.colour, cell):
                continue
            if all(_are_apart(item, other, picture_size) for other in items):
                items.append(item)
                break
        else:
            return None
    return tuple(items)


def _sample_item(
    rng: Random,
    look: tuple[str, str | None],
    cell: int,
    num_items: int,
    picture_size: tuple[int, int],
) -> Item | None:
    shape, colour = look
    colour = colour or rng.choice(tuple(COLOURS))
    names = ("small", "medium", "large") if num_items <= 2 else ("small", "medium")
    size = rng.choice(names)
    radius = rng.uniform(*SIZES[size])
    width, height = picture_size
    short = min(width, height)
    x = _keep_inside(CELL_CENTRES[cell % 3] + rng.uniform(-0.07, 0.07), radius * short / width)
    y = _keep_inside(CELL_CENTRES[cell // 3] + rng.uniform(-0.07, 0.07), radius * short / height)
    rgb = _jitter(rng, COLOURS[colour], 16)
    if colour in ("black", "white", "grey"):
        rgb = _jitter(rng, (_jitter(rng, COLOURS[colour], 10)[0],) * 3, 3)
    return Item(shape, colour, size, cell, x, y, radius, rng.uniform(-12, 12), rgb)


def _keep_inside(centre: float, radius: float) -> float:
    return min(max(centre, radius + 0.005), 1 - radius - 0.005)


def _are_apart(one: Item, other: Item, picture_size: tuple[int, int]) -> bool:
    short = min(picture_size)
    gap_x = (one.x - other.x) * picture_size[0] / short
    gap_y = (one.y - other.y) * picture_size[1] / short
    return math.hypot(gap_x, gap_y) >= one.radius + other.radius + 0.025


def _has_contrast(rgb: tuple[int, int, int], background: Background) -> bool:
    tones = [background.rgb]
    if background.pattern != "plain":
        tones.append(background.rgb_second)
    return all(math.dist(rgb, tone) >= MIN_CONTRAST for tone in tones)


def _jitter(rng: Random, rgb: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    return _clamp(tuple(channel + rng.uniform(-amount, amount) for channel in rgb))


def _clamp(rgb: tuple[float, ...]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(channel))) for channel in rgb)
    return red, green, blue
