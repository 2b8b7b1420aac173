"""Ask about scenes and answer: every answer follows from the scene alone.

``Turn.kind`` names what is asked, for tables of accuracy. Answers are plain, fixed sentences; the
wordings of the questions stand in ``phrases.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from . import phrases
from .scenes import CELLS, COLOURS, SHAPES, Item, Scene

NUMBERS = ("no", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth")
PLACES = {
    "top left": "in the top left", "top": "at the top", "top right": "in the top right",
    "left": "on the left", "center": "in the center", "right": "on the right",
    "bottom left": "in the bottom left", "bottom": "at the bottom",
    "bottom right": "in the bottom right",
}  # fmt: skip
MOVES = {
    "right": "to the right", "left": "to the left", "up": "up", "down": "down",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    kind: str
    question: str
    answer: str


Asker = Callable[[Scene, Random], Turn | None]


def ask_about_scene(scene: Scene, rng: Random) -> Turn:
    """Make up one question about a single picture.

    Args:
        scene: The picture.
        rng: Source of chance.

    Returns:
        The question with its answer.
    """
    names = tuple(ASKERS)
    weights = tuple(WEIGHTS[name] for name in names)
    while True:
        turn = ask_kind(scene, rng, rng.choices(names, weights)[0])
        if turn is not None:
            return turn


def ask_kind(scene: Scene, rng: Random, kind: str) -> Turn | None:
    """Make up a question of one kind of ``ASKERS``; None where the scene allows none."""
    turn = ASKERS[kind](scene, rng)
    return None if turn is None else _with_articles(turn)


def ask_about_pictures(scenes: Sequence[Scene], rng: Random, kind: str | None = None) -> Turn:
    """Make up one question about several pictures of one shape each.

    Args:
        scenes: The pictures in the order of the prompt.
        rng: Source of chance.
        kind: "which_picture" to ask for the picture of something; by chance if absent.

    Returns:
        The question with its answer.
    """
    return _with_articles(_ask_about_items([scene.items[0] for scene in scenes], rng, kind))


def ask_about_clip(frames: Sequence[Scene], direction: str, rng: Random) -> Turn:
    """Make up one question about the frames of a moving shape."""
    item = frames[0].items[0]
    if rng.random() < 0.2:
        mover = "Nothing moves." if direction == "still" else f"A {_full_name(item)} moves."
        return _with_articles(Turn("mover", _fill(rng, phrases.MOVER), mover))
    question = _fill(rng, phrases.DIRECTION, shape=item.shape)
    moves = "does not move" if direction == "still" else f"moves {MOVES[direction]}"
    subject = f"The {item.shape}" if item.shape in question else "It"
    return Turn("motion", question, f"{subject} {moves}.")


def small_talk(rng: Random) -> Turn:
    """Pick a question without a picture."""
    question, answer = rng.choice(phrases.SMALL_TALK)
    return Turn("small_talk", phrases.reword(question, rng), answer)


def describe(scene: Scene) -> str:
    """Describe the picture in one sentence, items in reading order."""
    background = f"{_article(scene.background.name)} {scene.background.name} background"
    if len(scene.items) == 1:
        item = scene.items[0]
        return f"A {item.size} {_full_name(item)} on {background}, {_place(item)}."
    ordered = sorted(scene.items, key=lambda item: item.cell)
    parts = [f"a {_full_name(item)} {_place(item)}" for item in ordered]
    return f"{NUMBERS[len(parts)].capitalize()} shapes on {background}: {_listing(parts)}."


def _ask_colour(scene: Scene, rng: Random) -> Turn | None:
    if len(scene.items) == 1 and rng.random() < 0.75:
        answer = f"The shape is {scene.items[0].colour}."
        return Turn("colour", _fill(rng, phrases.ONE_COLOUR), answer)
    item = _pick_unique(scene, rng, lambda item: item.shape)
    if item is None:
        return None
    question = _fill(rng, phrases.NAMED_COLOUR, shape=item.shape)
    return Turn("colour", question, f"The {item.shape} is {item.colour}.")


def _ask_shape(scene: Scene, rng: Random) -> Turn | None:
    if len(scene.items) == 1 and rng.random() < 0.75:
        return Turn("shape", _fill(rng, phrases.ONE_SHAPE), f"It is a {scene.items[0].shape}.")
    item = _pick_unique(scene, rng, lambda item: item.colour)
    if item is None:
        return None
    question = _fill(rng, phrases.COLOUR_SHAPE, colour=item.colour)
    return Turn("shape", question, f"The {item.colour} shape is a {item.shape}.")


def _ask_what(scene: Scene, rng: Random) -> Turn | None:
    if len(scene.items) > 1:
        ordered = sorted(scene.items, key=lambda item: item.cell)
        answer = f"I see {_listing([f'a {_full_name(item)}' for item in ordered])}."
    else:
        answer = f"It is a {_full_name(scene.items[0])}."
    return Turn("what", _fill(rng, phrases.ONE_WHAT), answer)


def _ask_position(scene: Scene, rng: Random) -> Turn | None:
    item = rng.choice(scene.items)
    others = [other for other in scene.items if other is not item]
    names = _unique_names(item, others)
    if not others:
        names = ["shape", *names]
    if not names:
        return None
    name = rng.choice(names)
    question = _fill(rng, phrases.POSITION, name=name)
    return Turn("position", question, f"The {name} is {_place(item)}.")


def _ask_at_place(scene: Scene, rng: Random) -> Turn | None:
    cell = rng.choice(scene.items).cell if rng.random() < 0.8 else rng.randrange(9)
    place = PLACES[CELLS[cell]]
    found = [item for item in scene.items if item.cell == cell]
    answer = f"A {_full_name(found[0])}." if found else "Nothing."
    return Turn("at_place", _fill(rng, phrases.AT_PLACE, place=place), answer)


def _ask_count(scene: Scene, rng: Random) -> Turn | None:
    return Turn("count", _fill(rng, phrases.COUNT), _there_are(len(scene.items), "shape"))


def _ask_count_some(scene: Scene, rng: Random) -> Turn | None:
    item = rng.choice(scene.items)
    if rng.random() < 0.5:
        name = item.shape if rng.random() < 0.8 else rng.choice(SHAPES)
        number = sum(other.shape == name for other in scene.items)
        plural = _plural(name)
    else:
        colour = item.colour if rng.random() < 0.8 else rng.choice(tuple(COLOURS))
        number = sum(other.colour == colour for other in scene.items)
        name, plural = f"{colour} shape", f"{colour} shapes"
    return Turn(
        "count_some", _fill(rng, phrases.COUNT_SOME, names=plural), _there_are(number, name)
    )


def _ask_is_there(scene: Scene, rng: Random) -> Turn | None:
    item = rng.choice(scene.items)
    shape, colour = item.shape, item.colour
    if rng.random() < 0.5:
        draw = rng.random()
        shape = rng.choice(SHAPES) if draw < 0.6 else shape
        colour = rng.choice(tuple(COLOURS)) if draw > 0.3 else colour
    if rng.random() < 0.4:
        name, is_there = shape, any(other.shape == shape for other in scene.items)
    else:
        name = f"{colour} {shape}"
        is_there = any(_full_name(other) == name for other in scene.items)
    answer = f"Yes, there is a {name}." if is_there else f"No, there is no {name}."
    return Turn("yes_no", _fill(rng, phrases.IS_THERE, name=name), answer)


def _ask_is_it(scene: Scene, rng: Random) -> Turn | None:
    if len(scene.items) > 1:
        return None
    item = scene.items[0]
    if rng.random() < 0.5:
        colour = item.colour if rng.random() < 0.5 else rng.choice(tuple(COLOURS))
        verdict = "Yes" if colour == item.colour else "No"
        question = _fill(rng, phrases.IS_COLOUR, colour=colour)
        return Turn("yes_no", question, f"{verdict}, the shape is {item.colour}.")
    shape = item.shape if rng.random() < 0.5 else rng.choice(SHAPES)
    verdict = "Yes" if shape == item.shape else "No"
    question = _fill(rng, phrases.IS_SHAPE, shape=shape)
    return Turn("yes_no", question, f"{verdict}, it is a {item.shape}.")


def _ask_size(scene: Scene, rng: Random) -> Turn | None:
    item = rng.choice(scene.items)
    names = _unique_names(item, [other for other in scene.items if other is not item])
    if len(scene.items) == 1:
        names = ["shape", *names]
    if not names:
        return None
    name = rng.choice(names)
    return Turn("size", _fill(rng, phrases.SIZE, name=name), f"The {name} is {item.size}.")


def _ask_background(scene: Scene, rng: Random) -> Turn | None:
    wordings: Sequence[str] = phrases.BACKGROUND
    if scene.background.pattern == "plain" and rng.random() < 0.5:
        wordings = phrases.BACKGROUND_COLOUR
    answer = f"The background is {scene.background.name}."
    return Turn("background", _fill(rng, wordings), answer)


def _ask_describe(scene: Scene, rng: Random) -> Turn | None:
    return Turn("describe", _fill(rng, phrases.DESCRIBE), describe(scene))


ASKERS: dict[str, Asker] = {
    "colour": _ask_colour, "shape": _ask_shape, "what": _ask_what, "position": _ask_position,
    "at_place": _ask_at_place, "count": _ask_count, "count_some": _ask_count_some,
    "is_there": _ask_is_there, "is_it": _ask_is_it, "size": _ask_size,
    "background": _ask_background, "describe": _ask_describe,
}  # fmt: skip
WEIGHTS = {
    "colour": 4, "shape": 4, "what": 1, "position": 5, "at_place": 2, "count": 6, "count_some": 3,
    "is_there": 3, "is_it": 1, "size": 2, "background": 1, "describe": 2,
}  # fmt: skip


def _ask_about_items(items: Sequence[Item], rng: Random, kind: str | None) -> Turn:
    index = rng.randrange(len(items))
    wanted = _unique_names(items[index], [*items[:index], *items[index + 1 :]])
    draw = rng.random()
    if kind == "which_picture" or (wanted and draw < 0.6):
        name = rng.choice(wanted) if wanted else _full_name(items[index])
        says_where = kind is None and rng.random() < 0.5
        return _ask_which(name, ORDINALS[index], rng, says_where)
    if draw < 0.8:
        return _ask_ordinal(items[index], ORDINALS[index], rng)
    if draw < 0.9 and len(items) == 2:
        return _ask_same(items, rng)
    if draw < 0.92:
        count = f"There are {NUMBERS[len(items)]} pictures."
        return Turn("num_pictures", _fill(rng, phrases.NUM_PICTURES), count)
    parts = [
        f"the {ORDINALS[at]} picture shows a {_full_name(one)}" for at, one in enumerate(items)
    ]
    return Turn("compare", _fill(rng, phrases.COMPARE), f"{_capital(_listing(parts))}.")


def _ask_which(name: str, ordinal: str, rng: Random, says_where: bool) -> Turn:
    if says_where:
        question = _fill(rng, phrases.WHERE_PICTURE, name=name)
        return Turn("where_picture", question, f"The {name} is in the {ordinal} picture.")
    question = _fill(rng, phrases.WHICH_PICTURE, name=name)
    return Turn("which_picture", question, f"The {ordinal} picture.")


def _ask_ordinal(item: Item, ordinal: str, rng: Random) -> Turn:
    if rng.random() < 0.5:
        question = _fill(rng, phrases.ORDINAL_WHAT, ordinal=ordinal)
        return Turn("ordinal", question, f"The {ordinal} picture shows a {_full_name(item)}.")
    question = _fill(rng, phrases.ORDINAL_COLOUR, ordinal=ordinal)
    return Turn("ordinal", question, f"The shape in the {ordinal} picture is {item.colour}.")


def _ask_same(items: Sequence[Item], rng: Random) -> Turn:
    first, second = items
    if rng.random() < 0.5:
        answer = f"No, the first shape is {first.colour} and the second shape is {second.colour}."
        if first.colour == second.colour:
            answer = f"Yes, both shapes are {first.colour}."
        return Turn("same", _fill(rng, phrases.SAME_COLOUR), answer)
    answer = f"No, the first shape is a {first.shape} and the second shape is a {second.shape}."
    if first.shape == second.shape:
        answer = f"Yes, both pictures show a {first.shape}."
    return Turn("same", _fill(rng, phrases.SAME_SHAPE), answer)


def _fill(rng: Random, wordings: Sequence[str], **fields: str) -> str:
    question = rng.choice(wordings).format(**fields)
    return phrases.reword(question, rng)


def _with_articles(turn: Turn) -> Turn:
    question, answer = (
        text.replace(" a orange", " an orange").replace("A orange", "An orange")
        for text in (turn.question, turn.answer)
    )
    return Turn(turn.kind, question, answer)


def _pick_unique(scene: Scene, rng: Random, key: Callable[[Item], str]) -> Item | None:
    keys = [key(item) for item in scene.items]
    unique = [item for item in scene.items if keys.count(key(item)) == 1]
    return rng.choice(unique) if unique else None


def _unique_names(item: Item, others: Sequence[Item]) -> list[str]:
    """Return the names that mean ``item`` and none of the others."""
    names = []
    if all(other.shape != item.shape for other in others):
        names.append(item.shape)
    if all(_full_name(other) != _full_name(item) for other in others):
        names.append(_full_name(item))
    return names


def _full_name(item: Item) -> str:
    return f"{item.colour} {item.shape}"


def _place(item: Item) -> str:
    return PLACES[CELLS[item.cell]]


def _there_are(number: int, name: str) -> str:
    if number == 1:
        return f"There is one {name}."
    return f"There are {NUMBERS[number]} {_plural(name)}."


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
