"""Two related tasks of drawn shapes, made on the fly: one to pretrain on, one to transfer to.

A shape is the region where a function of x and y is negative; it spans about one unit around the
origin. The function is close to the distance to the outline, so one `clip` antialiases it. Classes
do not differ by a mirror image or a rotation only. Colour, place, size and angle say nothing about
the class.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.primitives import as_primitive
from cifar_transfer.data.images import ArrayImages, Images
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split

MAX_IMAGES = 1_000_000  # 3 GB
SIDE = 32  # pixels
IMAGES_AT_ONCE = 1000  # tens of megabytes of temporaries, however many are drawn

Coordinates = tuple[np.ndarray, np.ndarray]  # x and y


class ShapesDataModule(ImageDataModule):
    """Drawn shapes of 32 x 32 pixels, made by this package: no files, no network.

    There are two tasks of ten classes each.

    Args:
        task: "upstream", to pretrain on, or "downstream", to transfer to.
        train_images: How many to draw for training and validation together.
        test_images: How many to draw for the test.
        **options: Those of `ImageDataModule`.
    """

    statistics = "cifar10"  # near enough to those of the shapes

    def __init__(
        self,
        task: str = "downstream",
        train_images: int = 400,
        test_images: int = 2000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.task: str = as_primitive("task", task)
        self.train_images: int = as_primitive("train_images", train_images)
        self.test_images: int = as_primitive("test_images", test_images)
        if self.task not in TASKS:
            raise UserError(
                f"There is no task {self.task!r} of shapes: take one of {', '.join(TASKS)}."
            )
        counts = {"train_images": self.train_images, "test_images": self.test_images}
        for name, count in counts.items():
            check(
                name, count, lambda images: 1 <= images <= MAX_IMAGES, f"1 to {MAX_IMAGES} images"
            )
        self.store_options(task=self.task, **counts)

    @property
    def class_names(self) -> list[str]:
        """Names of the task's ten shapes."""
        return list(TASKS[self.task])

    def load(self, split: Split) -> Images | None:
        """Return the drawn images of "train" or "test"."""
        if split == "val":
            return None
        if split == "train":
            images, labels = draw(self.task, self.train_images, 2 * self.seed)
        else:
            images, labels = draw(self.task, self.test_images, 2 * self.seed + 1)
        return ArrayImages(images.transpose(0, 3, 1, 2), labels)


def draw(task: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images of a task.

    The same arguments give the same images; another count or seed gives other images.

    Returns:
        Images, uint8 [count, 32, 32, 3] in RGB, and labels, int64 [count], indices into
        `TASKS[task]`: shuffled, and the numbers of images of two classes differ by at most one.

    Raises:
        UserError: The task is unknown, or the count is not positive.
    """
    if task not in TASKS:
        raise UserError(f"there is no task {task!r} of shapes: take one of {', '.join(TASKS)}.")
    if count < 1:
        raise UserError(
            f"cannot draw {count} images for the task {task!r} ({', '.join(TASKS)}): "
            f"ask for at least 1."
        )
    shapes = list(SHAPES[task].values())
    rng = np.random.default_rng([seed, list(TASKS).index(task), count])
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(shapes))
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for start in range(0, count, IMAGES_AT_ONCE):
        rows = slice(start, start + IMAGES_AT_ONCE)
        images[rows] = _paint(shapes, labels[rows], rng)
    return images, labels


# The order of the random draws in `_paint` and `_Chance` decides what a seed gives.


class _Chance:
    """Random values for each of n images."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self.count = count
        self.rng = rng
        centred = np.mgrid[:SIDE, :SIDE][:, None].astype(np.float32) - (SIDE - 1) / 2
        self.row, self.column = centred  # coordinates of the pixels around the middle

    def uniform(self, low: float, high: float, channels: tuple[int, ...] = ()) -> np.ndarray:
        """Draw numbers, float32 [n, 1, 1] or [n, 1, 1, *channels]."""
        shape = (self.count, 1, 1, *channels)
        return self.rng.uniform(low, high, shape).astype(np.float32)

    def colour(self, lightness: np.ndarray) -> np.ndarray:
        """Draw colours [n, 1, 1, 3] of about a lightness [n, 1, 1] in [0, 1]."""
        tint = self.uniform(-0.35, 0.35, (3,))
        return np.clip(lightness[..., None] + tint - tint.mean(-1, keepdims=True), 0, 1)

    def any_colour(self) -> np.ndarray:
        """Draw colours [n, 1, 1, 3]."""
        return self.colour(self.uniform(0, 1))

    def coordinates(self, reach: np.ndarray | float) -> Coordinates:
        """Draw the pixels' coordinates in a system that is moved and turned at random.

        Args:
            reach: Greatest distance of the origin from the middle along x and y, in pixels.

        Returns:
            x and y, [n, 32, 32] each.
        """
        angle = self.uniform(0, 2 * np.pi)
        x = self.column - reach * self.uniform(-1, 1)
        y = self.row - reach * self.uniform(-1, 1)
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _paint(shapes: list["Shape"], labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one shape for each label, uint8 [n, 32, 32, 3]."""
    chance = _Chance(len(labels), rng)
    # Lightness wraps around, so the shape is lighter than the background as often as darker, and
    # never close to it.
    lightness = chance.uniform(0, 1)
    ground = chance.colour(lightness)
    ink = chance.colour((lightness + chance.uniform(0.4, 0.6)) % 1)
    along, _ = chance.coordinates(0)
    image = ground + (along / SIDE * chance.uniform(0, 0.4))[..., None]

    # A line and a dot, of the background's own lightness or of any other, lie underneath and
    # distract.
    across, _ = chance.coordinates(12)
    line = _coverage(np.abs(across) - chance.uniform(0.2, 0.7))
    image += line * (chance.any_colour() - image)
    x, y = chance.coordinates(14)
    dot = _coverage(np.hypot(x, y) - chance.uniform(0.7, 2))
    image += dot * (chance.any_colour() - image)

    size = chance.uniform(10, 14)
    x, y = chance.coordinates(SIDE / 2 - 1 - size)
    x = x / (size * chance.uniform(0.9, 1))
    y = y / (size * chance.uniform(0.9, 1))
    distance = np.empty_like(x)
    for label, shape in enumerate(shapes):
        rows = labels == label
        distance[rows] = shape(x[rows], y[rows])
    image += _coverage(distance * size) * (ink - image)

    noise = rng.standard_normal(image.shape, np.float32)
    image += noise * chance.uniform(0.01, 0.04)[..., None]
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _coverage(distance: np.ndarray) -> np.ndarray:
    """Return the share of a pixel that is inside an outline, [..., 1] in [0, 1].

    Args:
        distance: Distance of the pixel from the outline in pixels, positive outside.
    """
    return np.clip(0.5 - distance, 0, 1)[..., None]


def _disc(x: np.ndarray, y: np.ndarray, radius: float, centre_x: float = 0.0) -> np.ndarray:
    return np.hypot(x - centre_x, y) - radius


def _box(x: np.ndarray, y: np.ndarray, left: float, right: float, half: float) -> np.ndarray:
    """Return the distance to a bar from `left` to `right`, `half` to either side of the x axis."""
    return np.maximum(np.abs(x - (left + right) / 2) - (right - left) / 2, np.abs(y) - half)


def _cone(x: np.ndarray, y: np.ndarray, tip: float, slope: float) -> np.ndarray:
    """Return the distance to a wedge that opens from (`tip`, 0) towards negative x.

    It gets wider by `slope` up and down for every unit.
    """
    return (np.abs(y) + slope * (x - tip)) / np.hypot(1, slope)


def _fold(x: np.ndarray, y: np.ndarray, times: int) -> Coordinates:
    """Fold the plane on the sector around the x axis, of `times` sectors around the origin.

    What is drawn along the x axis in the folded plane is repeated around the origin.
    """
    sector = 2 * np.pi / times
    radius = np.hypot(x, y)
    angle = np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2)
    return radius * np.cos(angle), radius * np.sin(angle)


def _round(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _disc(x, y, 0.8)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 3)
    return x - 0.52


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 4)
    return x - 0.7


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 5)
    return _cone(x, y, 1.0, 0.5)


def _plus(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 4)
    return _box(x, y, 0.0, 1.0, 0.22)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(_disc(x, y, 0.7)) - 0.2


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_disc(x, y, 0.95), -_disc(x, y, 0.75, 0.5))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x + 0.15
    y = y + 0.15
    square = _box(x, y, -0.5, 0.5, 0.5)
    return np.minimum.reduce([square, _disc(x, y, 0.5, 0.5), _disc(y, x, 0.5, 0.5)])


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    head = np.maximum(_cone(x, y, 1.0, 0.8), 0.1 - x)
    return np.minimum(_box(x, y, -1.0, 0.2, 0.2), head)


def _hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_cone(-np.abs(x), y, 0.05, 0.8), np.abs(x) - 0.85)


def _semicircle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_disc(x, y, 1.0, -0.4), -0.4 - x)


def _drop(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # The cone from the tip touches the disc, of radius 0.6 and 1.4 away, along its tangents.
    sine = 0.6 / 1.4
    cone = np.maximum(_cone(x, y, 1.0, sine / np.sqrt(1 - sine**2)), -0.4 + 0.6 * sine - x)
    return np.minimum(_disc(x, y, 0.6, -0.4), cone)


def _frame(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 4)
    return np.abs(x - 0.6) - 0.18


def _tee(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    stem = _box(x, y, -0.9, 0.8, 0.22)
    return np.minimum(stem, _box(y, x - 0.7, -0.8, 0.8, 0.22))


def _chevron(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(_cone(x, y, 0.5, 1.0)) - 0.2, -0.45 - x)


def _flower(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 5)
    return _disc(x, y, 0.36, 0.6)


def _horseshoe(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_ring(x, y), -_cone(-x, y, 0.0, 0.8))


def _dumbbell(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_disc(np.abs(x), y, 0.4, 0.6), _box(x, y, -0.6, 0.6, 0.15))


def _wye(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 3)
    return _box(x, y, 0.0, 1.0, 0.22)


def _sparkle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _fold(x, y, 4)
    return _cone(x, y, 1.0, 0.4)


Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]  # distance to the outline, in units
SHAPES: dict[str, dict[str, Shape]] = {
    "upstream": {
        "disc": _round,
        "triangle": _triangle,
        "square": _square,
        "star": _star,
        "plus": _plus,
        "ring": _ring,
        "crescent": _crescent,
        "heart": _heart,
        "arrow": _arrow,
        "hourglass": _hourglass,
    },
    "downstream": {
        "semicircle": _semicircle,
        "drop": _drop,
        "frame": _frame,
        "tee": _tee,
        "chevron": _chevron,
        "flower": _flower,
        "horseshoe": _horseshoe,
        "dumbbell": _dumbbell,
        "wye": _wye,
        "sparkle": _sparkle,
    },
}
TASKS: dict[str, tuple[str, ...]] = {task: tuple(shapes) for task, shapes in SHAPES.items()}
