"""Scenes of three objects on a 4 × 4 grid, their pictures, and questions about them with one-word answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow")
GRID, CELL = 4, 8
SIZE = GRID * CELL  # pixels
OBJECTS = 3

PALETTE = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
}


def _masks() -> dict[str, np.ndarray]:
    """Each shape as bool `[CELL, CELL]`."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    return {
        "circle": x**2 + y**2 <= 11,
        "square": (np.abs(x) < 3) & (np.abs(y) < 3),
        "triangle": (y < 3) & (np.abs(x) <= (y + 3.5) / 2),
        "cross": (np.abs(np.abs(x) - np.abs(y)) < 1) & (np.abs(x) < 3.6),
    }


MASKS = _masks()


@dataclass(frozen=True)
class Thing:
    """One object: what it is, its colour, and its cell, counted from the top left."""

    shape: str
    color: str
    row: int
    column: int


Scene = tuple[Thing, ...]


def draw_scene(generator: random.Random) -> Scene:
    """Three objects that differ in shape, colour and cell."""
    shapes, colors = generator.sample(SHAPES, OBJECTS), generator.sample(COLORS, OBJECTS)
    cells = generator.sample(range(GRID * GRID), OBJECTS)
    return tuple(Thing(s, c, *divmod(cell, GRID)) for s, c, cell in zip(shapes, colors, cells, strict=True))


def render(scene: Scene, generator: random.Random, palette: dict[str, tuple[int, int, int]] = PALETTE) -> np.ndarray:
    """The picture: uint8 `[SIZE, SIZE, 3]`, with a little noise."""
    noise = np.random.default_rng(generator.randrange(2**32))
    image = np.full((SIZE, SIZE, 3), 20.0)
    for thing in scene:
        top, left = thing.row * CELL, thing.column * CELL
        image[top : top + CELL, left : left + CELL][MASKS[thing.shape]] = palette[thing.color]
    return np.clip(image + noise.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Question:
    """A question with its answer; `options` are what a choice offers, the right one first."""

    task: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    things: tuple[Thing, ...] = ()  # what the question is about


def _query_color(scene: Scene, g: random.Random) -> Question:
    thing = g.choice(scene)
    return Question("QueryColor", f"what color is the {thing.shape} ?", thing.color.capitalize(), things=(thing,))


def _query_shape(scene: Scene, g: random.Random) -> Question:
    thing = g.choice(scene)
    return Question(
        "QueryShape", f"what shape is the {thing.color} thing ?", thing.shape.capitalize(), things=(thing,)
    )


def _side(thing: Thing) -> str:
    return "Left" if thing.column < GRID / 2 else "Right"


def _query_attr(scene: Scene, g: random.Random) -> Question:
    thing = g.choice(scene)
    return Question("QueryAttr", f"on which side is the {thing.shape} ?", _side(thing), things=(thing,))


def _choice(g: random.Random, right: str, wrong: str) -> tuple[str, str]:
    return (right, wrong) if g.random() < 0.5 else (wrong, right)


def _choose_attr(scene: Scene, g: random.Random) -> Question:
    thing = g.choice(scene)
    wrong = g.choice([color for color in COLORS if color != thing.color])
    first, second = _choice(g, thing.color, wrong)
    text = f"is the {thing.shape} {first} or {second} ?"
    return Question("ChooseAttr", text, thing.color.capitalize(), (thing.color, wrong), (thing,))


def _choose_cat(scene: Scene, g: random.Random) -> Question:
    thing = g.choice(scene)
    wrong = g.choice([shape for shape in SHAPES if shape != thing.shape])
    first, second = _choice(g, thing.shape, wrong)
    text = f"is the {thing.color} thing a {first} or a {second} ?"
    return Question("ChooseCat", text, thing.shape.capitalize(), (thing.shape, wrong), (thing,))


def _choose_rel(scene: Scene, g: random.Random) -> Question | None:
    pairs = [(a, b) for a in scene for b in scene if a.column != b.column]
    if not pairs:
        return None
    thing, other = g.choice(pairs)
    right, wrong = ("left", "right") if thing.column < other.column else ("right", "left")
    first, second = _choice(g, right, wrong)
    text = f"is the {thing.shape} {first} or {second} of the {other.shape} ?"
    return Question("ChooseRel", text, right.capitalize(), (right, wrong), (thing, other))


def _logical_obj(scene: Scene, g: random.Random) -> Question:
    present = [(thing.color, thing.shape) for thing in scene]
    absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in present]
    yes = g.random() < 0.5
    pair = [g.choice(present) if yes else g.choice(absent), g.choice(absent)]
    g.shuffle(pair)
    text = "is there a {} {} or a {} {} ?".format(*pair[0], *pair[1])
    things = tuple(thing for thing in scene if (thing.color, thing.shape) in pair)
    return Question("LogicalObj", text, "Yes" if yes else "No", ("yes", "no") if yes else ("no", "yes"), things)


TASKS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "QueryColor": _query_color,
    "QueryShape": _query_shape,
    "QueryAttr": _query_attr,
    "ChooseAttr": _choose_attr,
    "ChooseCat": _choose_cat,
    "ChooseRel": _choose_rel,
    "LogicalObj": _logical_obj,
}
OPEN = ("QueryColor", "QueryShape", "QueryAttr")  # what a model learns first


def can_ask(scene: Scene, tasks: tuple[str, ...]) -> bool:
    """Whether any of the tasks has a question about a scene: three things in one column are in no relation."""
    return tasks != ("ChooseRel",) or len({thing.column for thing in scene}) > 1


def ask(scene: Scene, generator: random.Random, tasks: tuple[str, ...] = tuple(TASKS)) -> Question:
    """A random question about a scene, of a random one of the tasks."""
    if not can_ask(scene, tasks):
        raise ValueError(f"tasks={tasks} have no question about this scene; see can_ask.")
    while True:
        question = TASKS[generator.choice(tasks)](scene, generator)
        if question is not None:
            return question


SYSTEM = "a chat about a picture ."
_QUESTION_WORDS = "USER : ASSISTANT ? what color is the shape thing on which side or a of there left right yes no"
_ANSWERS = "Left Right Yes No One Two Three"
WORDS = (
    *SYSTEM.split(),
    *_QUESTION_WORDS.split(),
    *SHAPES,
    *COLORS,
    *(word.capitalize() for word in (*SHAPES, *COLORS)),
    *_ANSWERS.split(),
)


def prompt(text: str) -> str:
    """A question as the model is asked it: the image stands where `<image>` does."""
    return f"{SYSTEM} USER : <image> {text} ASSISTANT :"
