"""Features of images (what comes into the head of a network) as files for other tools."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cifar_transfer.base.files import atomic_write
from cifar_transfer.base.text import printable
from cifar_transfer.inference.named_images import NamedImages
from cifar_transfer.results.thumbnails import MAX_SPRITE_SIDE, sprites, thumbnails

MAX_PROJECTED_IMAGES = 10_000  # TensorBoard's projector draws no more
PROJECTOR_COLUMNS = ["class", "image"]  # of its table; the first is also shown beside each point


@dataclass(frozen=True)
class Embeddings:
    """Features of N images, D numbers each.

    Attributes:
        names: Names of the images.
        predicted: The likeliest class of each image.
        features: float32 [N, D].
        thumbnails: Small copies of the first K images, uint8 [K, 3, H, W], or None.
    """

    names: list[str]
    predicted: list[str]
    features: np.ndarray
    thumbnails: Tensor | None

    def save(self, path: Path) -> None:
        """Write names, features and predicted classes to a `.npz` of plain arrays."""
        names = np.array(self.names)
        predicted = np.array(self.predicted)
        with atomic_write(path) as file:
            np.savez(file, names=names, features=self.features, predicted=predicted)

    def save_projector(self, folder: Path) -> None:
        """Write the images that have thumbnails to a folder, for TensorBoard's projector."""
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        assert self.thumbnails is not None
        count = len(self.thumbnails)
        table = []
        for name, predicted in zip(self.names[:count], self.predicted[:count], strict=True):
            table.append([predicted, printable(name)])
        with SummaryWriter(str(folder)) as board:
            board.add_embedding(
                self.features[:count],
                table,
                sprites(self.thumbnails),
                tag="features",
                metadata_header=PROJECTOR_COLUMNS,
            )


def embed(images: NamedImages, with_thumbnails: bool) -> Embeddings | None:
    """Return the features of all images that can be read, or None if there are none.

    Args:
        images: The images and their classifier.
        with_thumbnails: Also keep small copies of the first images, for `save_projector`.
    """
    names = []
    predicted = []
    small_images = []
    with images.classifier.model.features() as batches:
        for prediction in images.with_progress(images.predictions(top_k=1), printed=False):
            likeliest_class, _ = prediction.classes[0]
            names.append(prediction.source)
            predicted.append(likeliest_class)
            if with_thumbnails and len(names) <= MAX_PROJECTED_IMAGES:
                pixels = torch.from_numpy(prediction.pixels)[None]
                small_images.append(thumbnails(pixels, MAX_SPRITE_SIDE))
    if not names:
        return None
    return Embeddings(
        names=names,
        predicted=predicted,
        features=torch.cat(batches).numpy(),
        thumbnails=torch.cat(small_images) if small_images else None,
    )
