"""Make the questions that measure the model: scenes that training never shows.

Their seeds are apart from those of training, and each scene (one picture of a set, one frame of a
clip) has a combination of shape, colour and place that training leaves out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .questions import Turn, ask_about_clip, ask_about_pictures, ask_kind, small_talk
from .render import encode_picture, render_scene
from .scenes import MAX_ITEMS, Scene, sample_clip, sample_scene


@dataclass(frozen=True, slots=True)
class HeldOutQuestion:
    """A question with the pictures it is about and its one right answer."""

    scenes: tuple[Scene, ...]
    turn: Turn
    seed: str

    @property
    def text_is_first(self) -> bool:
        """Tell whether the prompt has the text before the pictures; true for about a third."""
        return Random(self.seed).random() < 0.3

    def files(self) -> list[tuple[bytes, str]]:
        """Return each picture as a file: its bytes and its MIME type."""
        rng = Random(f"files/{self.seed}")
        return [encode_picture(render_scene(scene), rng) for scene in self.scenes]


def make_questions(kind: str, number: int, seed: int) -> list[HeldOutQuestion]:
    """Make ``number`` held-out questions of a kind of ``KINDS``, as a function of the seed."""
    questions = []
    for index in range(number):
        name = f"held-out/{seed}/{kind}/{index}"
        rng = Random(name)
        scenes, turn = KINDS[kind](rng)
        questions.append(HeldOutQuestion(tuple(scenes), turn, name))
    return questions


def _about_scene(kind: str, most: int) -> Callable[[Random], tuple[list[Scene], Turn]]:
    def make(rng: Random) -> tuple[list[Scene], Turn]:
        number = 1 if kind not in ("count", "count_some") and rng.random() < 0.5 else 0
        while True:
            scene = sample_scene(rng, number or rng.randint(1, most), held_out=True)
            turn = ask_kind(scene, rng, kind)
            if turn is not None:
                return [scene], turn

    return make


def _about_pictures(rng: Random) -> tuple[list[Scene], Turn]:
    scenes = [sample_scene(rng, 1, held_out=True) for _ in range(2)]
    looks = {(scene.items[0].shape, scene.items[0].colour) for scene in scenes}
    if len(looks) == 1:
        return _about_pictures(rng)
    return scenes, ask_about_pictures(scenes, rng, "which_picture")


def _about_clip(rng: Random) -> tuple[list[Scene], Turn]:
    frames, direction = sample_clip(rng, rng.choice((3, 4)), held_out=True)
    while True:
        turn = ask_about_clip(frames, direction, rng)
        if turn.kind == "motion":
            return frames, turn


def _small_talk(rng: Random) -> tuple[list[Scene], Turn]:
    return [], small_talk(rng)


KINDS: dict[str, Callable[[Random], tuple[list[Scene], Turn]]] = {
    "colour": _about_scene("colour", 3),
    "shape": _about_scene("shape", 3),
    "position": _about_scene("position", 3),
    "count": _about_scene("count", MAX_ITEMS),
    "which_picture": _about_pictures,
    "motion": _about_clip,
    "what": _about_scene("what", 2),
    "at_place": _about_scene("at_place", 3),
    "count_some": _about_scene("count_some", MAX_ITEMS),
    "is_there": _about_scene("is_there", 3),
    "size": _about_scene("size", 2),
    "background": _about_scene("background", 2),
    "describe": _about_scene("describe", 3),
    "small_talk": _small_talk,
}
