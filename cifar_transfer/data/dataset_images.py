"""Images of somebody else's dataset: any map-style dataset of images and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.geometry import Fit, GreyRange, Size
from cifar_transfer.data.grey_values import extremes_of_values, range_of
from cifar_transfer.data.images import Images, has_more_than_8_bits, to_pixels

CHECKED_LABELS = 10  # items whose label is compared with the one that the dataset keeps elsewhere
MAX_SAMPLED_IMAGES = 200  # whose sizes decide the common size
LABELS = ("targets", "labels", "_labels")  # attributes that torchvision's datasets keep labels in
KINDS = "a PIL image, or uint8 of shape [H, W], [H, W, 3] or [3, H, W]"


class DatasetImages(Images):
    """Images of a dataset, made RGB and brought to one size when they are asked for.

    Args:
        dataset: `dataset[i]` is a pair of an image and its label, or a mapping with both. An image
            is a PIL image, or an array or tensor, uint8 [H, W], [H, W, 3] or [3, H, W].
        name: Name of the split, for messages.
        size: Height and width in pixels to bring images to, see `geometry.fit_image`.
        image_key: Key of the image, where items are mappings as those of Hugging Face's datasets.
        label_key: Key of the label.
        fit: How images of another shape are brought to the size.
        grey_range: Grey values that become black and white, as in `images.to_pixels`.

    Raises:
        UserError: An item has another form; the message says which one, and what it is.
    """

    on_the_fly = True

    def __init__(
        self,
        dataset: Any,
        name: str,
        size: Size,
        image_key: str = "image",
        label_key: str = "label",
        fit: Fit = "crop",
        grey_range: GreyRange | None = None,
    ) -> None:
        super().__init__(read_labels(dataset, name, image_key, label_key))
        self.dataset = dataset
        self.name = name
        self.size = size
        self.fit: Fit = fit
        self.grey_range = grey_range
        self.keys = (image_key, label_key)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Return the images, uint8 [B, 3, H, W], of some rows, int64 [B]."""
        images = []
        for row in rows.tolist():
            image, _ = read_item(self.dataset, self.name, row, *self.keys)
            images.append(to_pixels(image, self.size, self.fit, self.grey_range))
        return np.stack(images)


def sample_sizes(dataset: Any, name: str, image_key: str, label_key: str) -> list[Size]:
    """Return the sizes of some images of a dataset, evenly spread over it."""
    sizes = []
    count = min(MAX_SAMPLED_IMAGES, len(dataset))
    for row in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        image, _ = read_item(dataset, name, row, image_key, label_key)
        sizes.append((image.height, image.width))
    return sizes


def dataset_grey_range(dataset: Any, name: str, image_key: str, label_key: str) -> GreyRange | None:
    """Return the range of grey values of a dataset, None if its images have 8 bits.

    All items are read if some of a sample have more; see `grey_values.range_of`.
    """
    count = min(MAX_SAMPLED_IMAGES, len(dataset))
    for row in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        image, _ = read_item(dataset, name, row, image_key, label_key)
        if has_more_than_8_bits(image):
            break
    else:
        return None
    extremes = []
    for row in tqdm(range(len(dataset)), desc=f"grey values of {name}", unit="img", disable=None):
        image, _ = read_item(dataset, name, row, image_key, label_key)
        if has_more_than_8_bits(image):
            extremes_of_image = extremes_of_values(np.asarray(image))
            if extremes_of_image is not None:
                extremes.append(extremes_of_image)
    return range_of(extremes)


def read_labels(dataset: Any, name: str, image_key: str, label_key: str) -> np.ndarray:
    """Return all labels of a dataset, int64 [N].

    They are taken from its column or attribute, if it has one, because to read all items would
    decode all images.

    Raises:
        UserError: A label is no whole number.
    """
    if isinstance(dataset, Subset):
        labels = read_labels(dataset.dataset, name, image_key, label_key)
        return labels[np.asarray(dataset.indices, np.int64)]
    known = _known_labels(dataset, label_key)
    if known is not None and _are_those_of_items(known, dataset, name, image_key, label_key):
        return known
    labels = np.empty(len(dataset), np.int64)
    for row in tqdm(range(len(dataset)), desc=f"labels of {name}", unit="img", disable=None):
        _, label = read_item(dataset, name, row, image_key, label_key)
        labels[row] = label
    return labels


def _are_those_of_items(
    labels: np.ndarray, dataset: Any, name: str, image_key: str, label_key: str
) -> bool:
    """Return whether labels are those of the items, as far as some items tell.

    A `target_transform`, or a dataset that wraps another one, may change the labels of the items.
    """
    if len(labels) != len(dataset):
        return False
    count = min(CHECKED_LABELS, len(labels))
    for row in np.linspace(0, len(labels) - 1, count).astype(int).tolist():
        _, label = read_item(dataset, name, row, image_key, label_key)
        if label != labels[row]:
            return False
    return getattr(dataset, "target_transform", None) is None


def _known_labels(dataset: Any, label_key: str) -> np.ndarray | None:
    """Return the labels that a dataset has in one place, int64 [N], or None."""
    if label_key in getattr(dataset, "column_names", ()):  # Hugging Face's
        return np.asarray(dataset[label_key], np.int64)
    for attribute in LABELS:
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            array = np.asarray(labels)
            if array.ndim == 1 and array.dtype.kind in "iu":
                return array.astype(np.int64)
    return None


def read_item(
    dataset: Any, name: str, row: int, image_key: str, label_key: str
) -> tuple[Image.Image, int]:
    """Return one image and its label.

    Raises:
        UserError: The item has another form.
    """
    item = dataset[row]
    place = f"Item {row} of {name}"
    if isinstance(item, Mapping):
        missing = [key for key in (image_key, label_key) if key not in item]
        if missing:
            raise UserError(
                f"{place} has no {missing[0]!r}, but {', '.join(map(str, item))}: name the keys "
                f"with image_key and label_key."
            )
        image = item[image_key]
        label = item[label_key]
    elif isinstance(item, Sequence) and len(item) == 2:
        image, label = item
    else:
        raise UserError(f"{place} is a {type(item).__name__}, and no pair of image and label.")
    return _as_image(image, place), _as_label(label, place)


def _as_label(label: Any, place: str) -> int:
    array = np.asarray(label)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{place} has the label {label!r}: labels are whole numbers from 0, one an image."
        )
    return int(array.item())


def _as_image(image: Any, place: str) -> Image.Image:
    """Return an image of any accepted form as a PIL image."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (np.ndarray, Tensor)):
        raise UserError(f"{place} has a {type(image).__name__} as its image: take {KINDS}.")
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_image:
        raise UserError(
            f"{place} has {array.dtype} {list(image.shape)} as its image: take {KINDS}. Leave "
            f"ToTensor and Normalize out of its transforms: images are scaled and normalised later."
        )
    return Image.fromarray(np.ascontiguousarray(array))
