"""Pictures that are drawn, but are files as photographs are, of mixed sizes and shapes.

    python -m benchmarks.drawn_photographs FOLDER [--train N] [--test N]

A picture shows one of the ten shapes of `ShapesDataModule`'s downstream task, anywhere in the
picture and at any angle, on a mottled ground with lines, spots and boxes, blurred and noisy. It is
written as FOLDER/train/SHAPE/0000.jpg and so on: 160 to 400 pixels on the longer side, 0.6 to 1 of
this on the shorter one. The same number always gives the same picture, up to the codec of Pillow.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from cifar_transfer.data.shapes import SHAPES, Shape

SPLITS = {"train": 1, "test": 2}  # and the number with which the draws of each begin
JPEG_QUALITY = 88
MOTTLES = ((3, 0.5), (8, 0.25), (24, 0.12))  # cells across the picture, and their strength


class Canvas:
    """A picture of floats in [0, 1], [H, W, 3], and what is drawn on it at random.

    Args:
        rng: Source of all draws; their order decides what a seed gives.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        longer = int(rng.integers(160, 401))
        shorter = int(longer * rng.uniform(0.6, 1.0))
        self.height = longer
        self.width = shorter
        if rng.random() >= 0.5:
            self.height = shorter
            self.width = longer
        rows, columns = np.mgrid[: self.height, : self.width].astype(np.float32)
        self.rows = rows
        self.columns = columns
        self.pixels = np.full((self.height, self.width, 3), rng.random(3), np.float32)

    @property
    def shorter_side(self) -> int:
        """Pixels of the shorter side."""
        return min(self.height, self.width)

    def clouds(self, cells: int) -> np.ndarray:
        """Return smooth colours in about [0, 1], float32 [H, W, 3], of so many cells across."""
        coarse = (self.rng.random((cells, cells, 3)) * 255).astype(np.uint8)
        size = (self.width, self.height)
        smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(smooth, np.float32) / 255

    def mottle(self) -> None:
        """Vary the ground's colour from place to place."""
        for cells, strength in MOTTLES:
            clouds = self.clouds(cells) - 0.5
            self.pixels += strength * clouds * self.rng.uniform(0.4, 1.2)
        self.pixels.clip(0, 1, out=self.pixels)

    def turned(self, x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
        """Return coordinates in pixels about a place, turned by a random angle, each [H, W]."""
        angle = self.rng.uniform(0, 2 * np.pi)
        right = self.columns - x
        down = self.rows - y
        along = right * np.cos(angle) + down * np.sin(angle)
        across = down * np.cos(angle) - right * np.sin(angle)
        return along, across

    def paint(self, distance: np.ndarray, colour: np.ndarray, opacity: float = 1.0) -> None:
        """Paint where a distance to an outline in pixels, [H, W], is negative."""
        cover = np.clip(0.5 - distance, 0, 1)[..., None] * opacity
        self.pixels += cover * (colour - self.pixels)

    def clutter(self) -> None:
        """Paint four to nine lines, spots and boxes."""
        rng = self.rng
        side = self.shorter_side
        for _ in range(int(rng.integers(4, 10))):
            colour = rng.random(3)
            kind = rng.integers(3)
            along, across = self.turned(rng.uniform(0, self.width), rng.uniform(0, self.height))
            if kind == 0:
                distance = np.abs(across) - rng.uniform(0.5, 3)
            elif kind == 1:
                ellipse = np.hypot(along, across * rng.uniform(0.5, 2))
                distance = ellipse - rng.uniform(0.01, 0.05) * side
            else:
                beyond_ends = np.abs(along) - rng.uniform(0.02, 0.1) * side
                beyond_sides = np.abs(across) - rng.uniform(0.01, 0.03) * side
                distance = np.maximum(beyond_ends, beyond_sides)
            self.paint(distance, colour, rng.uniform(0.4, 1))

    def place(self, shape: Shape) -> None:
        """Paint a shape in a colour that is lighter or darker than what it covers."""
        rng = self.rng
        radius = rng.uniform(0.14, 0.34) * self.shorter_side
        reach_x = max(0, self.width / 2 - radius) * 0.75
        reach_y = max(0, self.height / 2 - radius) * 0.75
        x = self.width / 2 + rng.uniform(-1, 1) * reach_x
        y = self.height / 2 + rng.uniform(-1, 1) * reach_y
        along, across = self.turned(x, y)
        ground = self.pixels[int(y), int(x)].mean()
        lightness = (ground + rng.uniform(0.35, 0.6)) % 1
        tint = rng.uniform(-0.3, 0.3, 3)
        colour = np.clip(lightness + tint - tint.mean(), 0, 1)
        ink = colour + 0.15 * (self.clouds(12) - 0.5)
        self.paint(shape(along / radius, across / radius) * radius, ink)

    def photograph(self) -> Image.Image:
        """Return the picture with uneven light, noise and blur."""
        rng = self.rng
        right = self.columns / self.width - rng.random()
        down = self.rows / self.height - rng.random()
        self.pixels *= 1 - rng.uniform(0, 0.5) * (right**2 + down**2)[..., None]
        noise = rng.standard_normal(self.pixels.shape)
        self.pixels += noise * rng.uniform(0.01, 0.04)
        picture = Image.fromarray((self.pixels.clip(0, 1) * 255).round().astype(np.uint8))
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))


def draw(shape: Shape, seed: Sequence[int]) -> Image.Image:
    """Return a picture of a shape; the same seed gives the same one."""
    canvas = Canvas(np.random.default_rng(seed))
    canvas.mottle()
    canvas.clutter()
    canvas.place(shape)
    return canvas.photograph()


def main(args: Sequence[str]) -> None:
    """Draw the pictures of both splits."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="A new folder.")
    parser.add_argument("--train", type=int, default=20, help="Pictures of a class to train on.")
    parser.add_argument("--test", type=int, default=40, help="Pictures of a class to test on.")
    options = parser.parse_args(args)
    counts = {"train": options.train, "test": options.test}
    for split, first in SPLITS.items():
        for label, (name, shape) in enumerate(SHAPES["downstream"].items()):
            folder = options.folder / split / name
            folder.mkdir(parents=True)
            for number in range(counts[split]):
                picture = draw(shape, [first, label, number])
                picture.save(folder / f"{number:04d}.jpg", quality=JPEG_QUALITY)


if __name__ == "__main__":
    main(sys.argv[1:])
