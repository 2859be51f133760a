"""How long a folder of very many images takes to open: `python -m benchmarks.files [COUNT]`.

COUNT images of 8 x 8 pixels, all different, in 100 folders of classes, are written to a temporary
folder and removed afterwards: a million take 4 GB of disk. They are listed, compared for copies,
split and decoded on the fly, up to the first batch of training, by two processes in turn: the first
also decodes all of them, to find broken files. All have one size in bytes, so that the beginning of
every file is read to compare it.
"""

import io
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cifar_transfer import ImageFolderDataModule
from cifar_transfer.base.text import markdown

COUNT = 1_000_000
CLASSES = 100
SIDE = 8  # pixels
HEADER_BYTES = 54  # of a BMP


def write_images(folder: Path, count: int) -> None:
    """Write images of noise, `train/<class>/<number>.bmp`."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(file, "BMP")
    header = file.getvalue()[:HEADER_BYTES]
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        class_folder = folder / "train" / f"class_{label:03d}"
        class_folder.mkdir(parents=True)
        pixels = rng.integers(0, 256, (count // CLASSES, 3 * SIDE * SIDE), dtype=np.uint8)
        for number, image in enumerate(pixels):
            path = class_folder / f"IMG_{number:07d}.bmp"
            path.write_bytes(header + image.tobytes())


def peak_megabytes() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(folder: Path) -> list[list[str]]:
    """Return a table of the steps to the first batch: seconds, those of processors, memory."""
    table = [["up to", "seconds", "of processors", "MB beyond the imports"]]
    torch.zeros(1)
    start = time.monotonic()
    processor_start = time.process_time()
    megabytes = peak_megabytes()

    def add_row(step: str) -> None:
        seconds = time.monotonic() - start
        processor_seconds = time.process_time() - processor_start
        row = [f"{seconds:.1f}", f"{processor_seconds:.1f}", f"{peak_megabytes() - megabytes:.0f}"]
        table.append([step, *row])

    data = ImageFolderDataModule(str(folder), cache_limit_gb=0, num_workers=0)
    data.prepare_data()
    add_row("listed")
    data.setup()
    add_row("compared and split")
    next(iter(data.train_dataloader()))
    add_row("first batch")
    return table


def main(count: int = COUNT) -> None:
    """Write the images, and print a table for the first start and one for a later one."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), count)
        for _ in range(2):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                print(markdown(process.submit(measure, Path(folder)).result()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
