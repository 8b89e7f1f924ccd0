"""The demo set: eight classes, each a colour, a shape and a motion; their captions; and a tracker that recognises them.

`draw_clip` draws one clip (`demo/data.py` writes many as mp4 files in the UCF101 layout); `track` recognises colour and
motion from the pixels of any clip, without its label; `accuracy` is how often they match the labels.

Letters: T frames of a clip, H W height and width. Lengths are in units of the frame's side, y points down.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# Eight hues, 45 degrees apart: a colour is recognised if it is off by less than half of that.
COLOURS = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "pink")
PALETTE = np.array([colorsys.hsv_to_rgb(i / len(COLOURS), 0.9, 0.95) for i in range(len(COLOURS))])  # (8, 3)

# Interior of a body; (u, v) are measured from its centre in radii. All shapes fit in a circle of REACH radii.
REACH = 1.25
SHAPES: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "disc": lambda u, v: u * u + v * v < 1.0,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.88,
    "diamond": lambda u, v: abs(u) + abs(v) < 1.25,
    "triangle": lambda u, v: np.maximum(v, math.sqrt(0.75) * abs(u) - 0.5 * v) < 0.62,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.45) & (np.maximum(abs(u), abs(v)) < 1.15),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.875) < 0.325,
}


class Motion(NamedTuple):
    """A motion: its direction in (x, y, radius), and two wordings, each in the -ing form and after "that"."""

    direction: tuple[int, int, int]
    wordings: tuple[tuple[str, str], tuple[str, str]]


MOTIONS = {
    "left": Motion((-1, 0, 0), (("moving left", "moves left"), ("going to the left", "goes to the left"))),
    "right": Motion((1, 0, 0), (("moving right", "moves right"), ("going to the right", "goes to the right"))),
    "up": Motion((0, -1, 0), (("moving up", "moves up"), ("rising to the top", "rises to the top"))),
    "down": Motion((0, 1, 0), (("moving down", "moves down"), ("falling to the bottom", "falls to the bottom"))),
    "grow": Motion((0, 0, 1), (("growing", "grows"), ("getting larger", "gets larger"))),
    "shrink": Motion((0, 0, -1), (("shrinking", "shrinks"), ("getting smaller", "gets smaller"))),
}
CAPTIONS = (
    "{a} {colour} {shape} {moving}",
    "{a} {colour} {shape} that {moves}",
    "the {shape} is {colour} and {moves}",
    "{moving}, a {shape} of {colour} colour",
    "a video of one {colour} {shape} {moving}",
)


class DemoClass(NamedTuple):
    """One class: appearance (`colour`, `shape`) and `motion`."""

    colour: str
    shape: str
    motion: str

    @property
    def name(self) -> str:
        """Name of the class and its folder, such as `RedDiscRight`."""
        return "".join(part.title() for part in self)


# In the order of their folder names, so that the position in this table is the label.
CLASSES = (
    DemoClass("amber", "square", "left"),
    DemoClass("blue", "diamond", "down"),
    DemoClass("cyan", "triangle", "up"),
    DemoClass("green", "cross", "grow"),
    DemoClass("lime", "ring", "shrink"),
    DemoClass("pink", "disc", "grow"),
    DemoClass("red", "disc", "right"),
    DemoClass("violet", "square", "shrink"),
)


def captions_of(kind: DemoClass) -> list[str]:
    """Returns every caption for clips of `kind`, which need not be one of `CLASSES`; the plainest first."""
    article = "an" if kind.colour[0] in "aeiou" else "a"
    return [
        caption.format(a=article, colour=kind.colour, shape=kind.shape, moving=moving, moves=moves)
        for moving, moves in MOTIONS[kind.motion].wordings
        for caption in CAPTIONS
    ]


SUPERSAMPLING = 4  # points per pixel and axis


def draw_path(motion: str, rng: np.random.Generator, frames: int) -> tuple[Array, Array, Array]:
    """Returns a random path of a body, centre x, y and radius, each (T,); the body never leaves the frame."""
    dx, dy, growth = MOTIONS[motion].direction
    if growth:
        small, large = rng.uniform(0.09, 0.12), rng.uniform(0.26, 0.32)
        x, y = rng.uniform(REACH * large, 1.0 - REACH * large, size=2)
        return np.full(frames, x), np.full(frames, y), np.linspace(small, large, frames)[::growth]
    radius = rng.uniform(0.13, 0.17)
    reach = REACH * radius
    travel = rng.uniform(0.42, 1.0 - 2.0 * reach)
    start = rng.uniform(reach, 1.0 - reach - travel)  # low end of the path
    along = (start + travel * np.linspace(0.0, 1.0, frames))[:: dx + dy]
    across = np.full(frames, rng.uniform(reach, 1.0 - reach))
    return (along if dx else across), (along if dy else across), np.full(frames, radius)


def cover_pixels(shape: str, path: tuple[Array, Array, Array], size: int) -> Array:
    """Returns the fraction of each pixel that the body covers, (T, size, size) in [0, 1]."""
    points = (np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING)
    x, y, radius = (values[:, None, None] for values in path)
    inside = SHAPES[shape]((points[None, None, :] - x) / radius, (points[None, :, None] - y) / radius)
    return inside.reshape(len(x), size, SUPERSAMPLING, size, SUPERSAMPLING).mean(axis=(2, 4))


def draw_clip(label: int, rng: np.random.Generator, *, size: int = 32, frames: int = 20) -> NDArray[np.uint8]:
    """Draws an anti-aliased clip of class `CLASSES[label]`, (frames, 3, size, size) uint8."""
    kind = CLASSES[label]
    colour = PALETTE[COLOURS.index(kind.colour)][:, None, None]
    ground = rng.uniform(0.08, 0.35) if rng.uniform() < 0.5 else rng.uniform(0.65, 0.92)  # dark or light
    cover = cover_pixels(kind.shape, draw_path(kind.motion, rng, frames), size)[:, None]
    return np.round(255.0 * (ground + (colour - ground) * cover)).astype(np.uint8)


class Track(NamedTuple):
    """Result of `track`; `colour` is None unless there is exactly one body, `motion` unless it is known."""

    colour: str | None = None
    motion: str | None = None
    x: Array = np.empty(0)  # (T,) centre of the body, in units of the frame's side; empty without a body
    y: Array = np.empty(0)  # (T,)
    radius: Array = np.empty(0)  # (T,) of the disc of the same area


# A body is a compact patch of one saturated colour, present in almost every frame.
MIN_CHROMA = 0.20  # the body's distance from grey; the palette has 0.61 to 0.70
MIN_COHERENCE = 0.90  # length of the mean of the body's unit chroma vectors: 1 is one hue, 0 is noise
MIN_AREA, MAX_AREA = 0.008, 0.60  # of the frame
MAX_SPREAD = 2.2  # second moment over that of a disc of the same area: square 1.05, cross 1.3, ring 1.5
MIN_PRESENT = 0.9  # share of the frames in which the body must be found

MIN_TRAVEL = 0.15  # translations: net displacement, in units of the frame's side
MIN_GROWTH = math.log(1.35)  # grow and shrink: |log| of the ratio of the last to the first radius
MAX_WOBBLE = 0.15  # RMS deviation from the fitted path, relative to its extent
MAX_DRIFT = 0.10  # grow and shrink: deviation of the centre from its line, in units of the side


def measure_chroma(video: Array) -> Array:
    """Returns pixels minus the background colour, without their grey part, (T, 3, H, W); about 0 in the background."""
    edges = [video[..., :2, :], video[..., -2:, :]]  # the top and bottom rows, which bodies rarely touch
    border = np.concatenate([edge.reshape(*video.shape[:2], -1) for edge in edges], axis=-1)
    difference = video - np.median(border, axis=(0, 2))[:, None, None]
    return difference - difference.mean(axis=1, keepdims=True)


def find_body_colour(chroma: Array) -> Array | None:
    """Returns the mean chroma vector (3,) of the most saturated pixels, or None if they do not share a hue."""
    strength = np.linalg.norm(chroma, axis=1)
    count = max(1, int(MIN_AREA * strength[0].size))
    core = np.partition(strength.reshape(len(strength), -1), -count, axis=1)[:, -count]  # per frame
    level = 0.8 * float(np.median(core))
    if level < 0.8 * MIN_CHROMA:
        return None
    vectors = np.moveaxis(chroma, 1, -1)[strength > level]  # (pixels, 3)
    mean = vectors.mean(axis=0)
    coherence = np.linalg.norm(mean) / np.linalg.norm(vectors, axis=1).mean()
    return mean if coherence > MIN_COHERENCE else None


def measure_body(chroma: Array, colour: Array) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Returns centre x, y and radius of the body, and its presence, each (T,), from pixel coverage."""
    cover = np.einsum("tchw,c->thw", chroma, colour) / float(colour @ colour)
    cover = np.where(cover > 0.3, cover.clip(0.0, 1.0), 0.0)
    height, width = cover.shape[1:]
    xs, ys = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    area = cover.mean(axis=(1, 2))
    mass = np.maximum(cover.sum(axis=(1, 2)), 1e-9)
    x, y = cover.sum(axis=1) @ xs / mass, cover.sum(axis=2) @ ys / mass
    moment = (cover.sum(axis=1) @ xs**2 + cover.sum(axis=2) @ ys**2) / mass - x**2 - y**2
    spread = 2.0 * math.pi * moment / np.maximum(area, 1e-9)
    present = (area > MIN_AREA) & (area < MAX_AREA) & (spread < MAX_SPREAD)
    return x, y, np.sqrt(area / math.pi), present


def fit_line(values: Array, times: Array) -> tuple[float, float]:
    """Fits a Theil-Sen line; returns its change over all times, and the RMS deviation from it."""
    first, second = np.triu_indices(len(times), k=1)
    slope = float(np.median((values[second] - values[first]) / (times[second] - times[first])))
    rest = values - slope * times
    return slope * float(times[-1] - times[0]), float(np.sqrt(np.mean((rest - np.median(rest)) ** 2)))


def name_motion(x: Array, y: Array, radius: Array, times: Array) -> str | None:
    """Returns the direction of a straight motion, or `grow` or `shrink`; None for neither or both."""
    (way_x, wobble_x), (way_y, wobble_y) = fit_line(x, times), fit_line(y, times)
    growth, unsteadiness = fit_line(np.log(radius), times)
    off_line = math.hypot(wobble_x, wobble_y)
    travel, sideways = max(abs(way_x), abs(way_y)), min(abs(way_x), abs(way_y))
    travels, grows = travel > MIN_TRAVEL, abs(growth) > MIN_GROWTH
    if travels and not grows and travel > 2.0 * sideways and off_line < MAX_WOBBLE * travel:
        if abs(way_x) > abs(way_y):
            return "right" if way_x > 0 else "left"
        return "down" if way_y > 0 else "up"
    if grows and not travels and off_line < MAX_DRIFT and unsteadiness < MAX_WOBBLE * abs(growth):
        return "grow" if growth > 0 else "shrink"
    return None


def track(video: Any) -> Track:
    """Recognises colour and motion of the body in a clip from its pixels.

    `video` is uint8 RGB, (T, 3, H, W), T at least 4, a numpy array or a tensor on the CPU. Colour and motion
    are None unless there is exactly one compact, saturated body; motion is None unless it is one of the six.

    Raises: ValueError if `video` is not uint8 of that shape.
    """
    pixels = np.asarray(video)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) < 4:
        raise ValueError(f"a clip must be uint8 (T >= 4, 3, H, W), got {pixels.dtype} {pixels.shape}")
    chroma = measure_chroma(pixels / 255.0)
    colour = find_body_colour(chroma)
    if colour is None:
        return Track()
    x, y, radius, present = measure_body(chroma, colour)
    if present.mean() < MIN_PRESENT:
        return Track()
    x, y, radius, times = x[present], y[present], radius[present], np.flatnonzero(present).astype(float)
    hues = PALETTE - PALETTE.mean(axis=1, keepdims=True)
    nearest = (hues @ colour / np.linalg.norm(hues, axis=1)).argmax()  # by the cosine
    return Track(COLOURS[int(nearest)], name_motion(x, y, radius, times), x, y, radius)


def accuracy(videos: Iterable[Any], labels: Iterable[int]) -> dict[str, float]:
    """Returns `appearance_accuracy` and `motion_accuracy`: shares of clips tracked with the label's colour and motion.

    `videos` as for `track`; `labels` are positions in `CLASSES`. A clip without a recognised body counts as wrong.
    """
    pairs = [(track(video), CLASSES[label]) for video, label in zip(videos, labels, strict=True)]
    return {
        "appearance_accuracy": float(np.mean([seen.colour == kind.colour for seen, kind in pairs])),
        "motion_accuracy": float(np.mean([seen.motion == kind.motion for seen, kind in pairs])),
    }
