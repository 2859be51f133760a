"""Files of which some are never read."""

import numpy as np

from cifar_transfer.data.images import FileImages, Images


class PartlyReadImages(Images):
    """Images of files of which some are never decoded: black images take their places.

    Args:
        images: The files.
        rows_to_read: Rows, int64, of those that are decoded.
    """

    on_the_fly = True

    def __init__(self, images: FileImages, rows_to_read: np.ndarray) -> None:
        super().__init__(images.labels)
        self.images = images
        self.rows_to_read = rows_to_read

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Return the images, uint8 [B, 3, H, W], of some rows, int64 [B]."""
        is_read = np.isin(rows, self.rows_to_read)
        pixels = np.zeros((len(rows), 3, *self.images.size), np.uint8)
        if is_read.any():
            pixels[is_read] = self.images.pixels(rows[is_read])
        return pixels
