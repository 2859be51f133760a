"""Two related tasks of drawn shapes, made on the fly: something to pretrain on and something to transfer to.

A shape is the region where a function of x and y is negative; it spans about one unit around the origin. The function
is close to the distance to the outline, so one `clip` antialiases it. Classes do not differ by a mirror image or a
rotation only. Colour, place, size and angle say nothing about the class.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.data.images import ArrayImages, Images
from cifar_transfer.data.module import ImageDataModule, Split

MOST = 1_000_000  # images, 3 GB
_SIDE = 32  # pixels
_CHUNK = 1000  # images drawn at once: tens of megabytes of temporaries, whatever the count

_Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _disc(x: np.ndarray, y: np.ndarray, radius: float, cx: float = 0.0) -> np.ndarray:
    return np.hypot(x - cx, y) - radius


def _box(x: np.ndarray, y: np.ndarray, left: float, right: float, half: float) -> np.ndarray:
    """A bar from `left` to `right` along x, `half` to either side of the x axis."""
    return np.maximum(np.abs(x - (left + right) / 2) - (right - left) / 2, np.abs(y) - half)


def _cone(x: np.ndarray, y: np.ndarray, tip: float, slope: float) -> np.ndarray:
    """A wedge that opens from (`tip`, 0) towards negative x, `slope` up and down for every unit."""
    return (np.abs(y) + slope * (x - tip)) / np.hypot(1, slope)


def _around(times: int, shape: _Shape) -> _Shape:
    """Repeat around the origin what `shape` draws along the x axis, by folding the plane on a sector."""
    sector = 2 * np.pi / times

    def folded(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        radius, angle = (
            np.hypot(x, y),
            np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2),
        )
        return shape(radius * np.cos(angle), radius * np.sin(angle))

    return folded


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x + 0.15, y + 0.15
    return np.minimum.reduce(
        [_box(x, y, -0.5, 0.5, 0.5), _disc(x, y, 0.5, 0.5), _disc(y, x, 0.5, 0.5)]
    )


def _drop(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sine = (
        0.6 / 1.4
    )  # the cone from the tip touches the disc, of radius 0.6 and 1.4 away, along its tangents
    cone = np.maximum(_cone(x, y, 1.0, sine / np.sqrt(1 - sine**2)), -0.4 + 0.6 * sine - x)
    return np.minimum(_disc(x, y, 0.6, -0.4), cone)


_bar = partial(_box, left=0.0, right=1.0, half=0.22)
_SHAPES: dict[str, dict[str, _Shape]] = {
    "upstream": {
        "disc": lambda x, y: _disc(x, y, 0.8),
        "triangle": _around(3, lambda x, y: x - 0.52),
        "square": _around(4, lambda x, y: x - 0.7),
        "star": _around(5, lambda x, y: _cone(x, y, 1.0, 0.5)),
        "plus": _around(4, _bar),
        "ring": lambda x, y: np.abs(_disc(x, y, 0.7)) - 0.2,
        "crescent": lambda x, y: np.maximum(_disc(x, y, 0.95), -_disc(x, y, 0.75, 0.5)),
        "heart": _heart,
        "arrow": lambda x, y: np.minimum(
            _box(x, y, -1.0, 0.2, 0.2), np.maximum(_cone(x, y, 1.0, 0.8), 0.1 - x)
        ),
        "hourglass": lambda x, y: np.maximum(_cone(-np.abs(x), y, 0.05, 0.8), np.abs(x) - 0.85),
    },
    "downstream": {
        "semicircle": lambda x, y: np.maximum(_disc(x, y, 1.0, -0.4), -0.4 - x),
        "drop": _drop,
        "frame": _around(4, lambda x, y: np.abs(x - 0.6) - 0.18),
        "tee": lambda x, y: np.minimum(
            _box(x, y, -0.9, 0.8, 0.22), _box(y, x - 0.7, -0.8, 0.8, 0.22)
        ),
        "chevron": lambda x, y: np.maximum(np.abs(_cone(x, y, 0.5, 1.0)) - 0.2, -0.45 - x),
        "flower": _around(5, lambda x, y: _disc(x, y, 0.36, 0.6)),
        "horseshoe": lambda x, y: np.maximum(
            np.abs(_disc(x, y, 0.7)) - 0.2, -_cone(-x, y, 0.0, 0.8)
        ),
        "dumbbell": lambda x, y: np.minimum(
            _disc(np.abs(x), y, 0.4, 0.6), _box(x, y, -0.6, 0.6, 0.15)
        ),
        "wye": _around(3, _bar),
        "sparkle": _around(4, lambda x, y: _cone(x, y, 1.0, 0.4)),
    },
}
TASKS: dict[str, tuple[str, ...]] = {task: tuple(shapes) for task, shapes in _SHAPES.items()}


def _ink(distance: np.ndarray) -> np.ndarray:
    """How much of a pixel an outline `distance` pixels away covers, from 0 (outside) to 1, with an axis for colour."""
    return np.clip(0.5 - distance, 0, 1)[..., None]


def _paint(shapes: list[_Shape], labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one shape for every label, uint8 [n, 32, 32, 3]."""

    def uniform(low: float, high: float, channels: tuple[int, ...] = ()) -> np.ndarray:
        return rng.uniform(low, high, (len(labels), 1, 1, *channels)).astype(np.float32)

    def coloured(lightness: np.ndarray) -> np.ndarray:
        """A random colour of about that lightness in [0, 1] for every image, [n, 1, 1, 3]."""
        tint = uniform(-0.35, 0.35, (3,))
        return np.clip(lightness[..., None] + tint - tint.mean(-1, keepdims=True), 0, 1)

    row, column = np.mgrid[:_SIDE, :_SIDE][:, None].astype(np.float32) - (_SIDE - 1) / 2

    def turned(reach: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates [n, 32, 32] around a random point at most `reach` from the middle, at a random angle."""
        angle = uniform(0, 2 * np.pi)
        x, y = column - reach * uniform(-1, 1), row - reach * uniform(-1, 1)
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    # Lightness wraps around, so the shape is lighter than the background as often as darker, and never close to it.
    lightness = uniform(0, 1)
    ground, ink = coloured(lightness), coloured((lightness + uniform(0.4, 0.6)) % 1)
    along, _ = turned(0)
    image = ground + (along / _SIDE * uniform(0, 0.4))[..., None]
    # A line and a dot, of the background's own lightness or of any other, lie underneath and distract.
    across, _ = turned(12)
    image += _ink(np.abs(across) - uniform(0.2, 0.7)) * (coloured(uniform(0, 1)) - image)
    image += _ink(np.hypot(*turned(14)) - uniform(0.7, 2)) * (coloured(uniform(0, 1)) - image)

    size = uniform(10, 14)
    x, y = (axis / (size * uniform(0.9, 1)) for axis in turned(_SIDE / 2 - 1 - size))
    distance = np.empty_like(x)
    for label, shape in enumerate(shapes):
        chosen = labels == label
        distance[chosen] = shape(x[chosen], y[chosen])
    image += _ink(distance * size) * (ink - image)
    image += rng.standard_normal(image.shape, np.float32) * uniform(0.01, 0.04)[..., None]
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def draw(task: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images of a task: the same ones for the same arguments, all others for another count or seed.

    Returns:
        Images, uint8 [count, 32, 32, 3] in RGB, and labels, int64 [count], indices into `TASKS[task]`: shuffled, and
        every class as often as any other, give or take one.

    Raises:
        UserError: the task is unknown, or the count is not positive.
    """
    if task not in TASKS:
        raise UserError(f"there is no task {task!r} of shapes: take one of {', '.join(TASKS)}.")
    if count < 1:
        raise UserError(
            f"cannot draw {count} images for the task {task!r} ({', '.join(TASKS)}): ask for at least 1."
        )
    rng = np.random.default_rng([seed, list(TASKS).index(task), count])
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(TASKS[task]))
    images = np.empty((count, _SIDE, _SIDE, 3), np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        images[chunk] = _paint([*_SHAPES[task].values()], labels[chunk], rng)
    return images, labels


class ShapesDataModule(ImageDataModule):
    """Drawn shapes of 32 x 32 pixels, made by this package: two tasks of ten classes each, no files, no network.

    Args:
        task: "upstream", to pretrain on, or "downstream", to transfer to.
        train_images: How many to draw for training and validation together.
        test_images: How many to draw for the test.
        **options: Those of `ImageDataModule`.
    """

    statistics = "cifar10"  # near enough to theirs

    def __init__(
        self,
        task: str = "downstream",
        train_images: int = 400,
        test_images: int = 2000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if task not in TASKS:
            raise UserError(f"There is no task {task!r} of shapes: take one of {', '.join(TASKS)}.")
        counts = {"train_images": train_images, "test_images": test_images}
        for name, count in counts.items():
            check(name, count, lambda n: 1 <= n <= MOST, f"1 to {MOST} images")
        self.task, self.train_images, self.test_images = task, train_images, test_images
        self.record(task=task, **counts)

    @property
    def class_names(self) -> list[str]:
        """The names of the task's ten shapes."""
        return list(TASKS[self.task])

    def load(self, split: Split) -> Images | None:
        """The drawn images of "train" or "test"."""
        if split == "val":
            return None
        count, seed = (
            (self.train_images, 2 * self.seed)
            if split == "train"
            else (self.test_images, 2 * self.seed + 1)
        )
        pixels, labels = draw(self.task, count, seed)
        return ArrayImages(pixels.transpose(0, 3, 1, 2), labels)
