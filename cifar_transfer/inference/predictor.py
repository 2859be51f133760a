"""A trained checkpoint as a function from images to names of classes, see `Classifier`."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.base.machine import cores
from cifar_transfer.data.geometry import to_float
from cifar_transfer.data.images import MAX_MEGAPIXELS, read_image, to_pixels
from cifar_transfer.network.image_classifier import ImageClassifier
from cifar_transfer.network.mirrored import Mirrored
from cifar_transfer.results.predictions import ImagePrediction
from cifar_transfer.training.checkpoint_file import load_classifier

Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor
ClassShare = tuple[str, float]  # the name of a class and its probability
Batch = list[tuple[Picture, Future[np.ndarray]]]  # pictures, and their pixels once they are decoded

MAX_NAMES_SHOWN = 5  # of classes, where a classifier is printed


class Classifier:
    """A trained network that classifies pictures of any size.

    Args:
        model: The trained network. It is put into eval mode, on the device.
        accelerator: "auto" for a GPU if there is one, "gpu" (or its kind, "cuda", "mps"), or "cpu".
        max_megapixels: A file with more million pixels is refused before it is decoded.
        mirrored: Predict from each picture and its mirror image together, in twice the time.

    Attributes:
        class_names: Names of the classes, in the order of the network's outputs.
        size: Height and width of the training images in pixels, to which each picture is brought.

    Raises:
        UserError: There is no such accelerator, or the limit is not positive.

    Example::

        classifier = Classifier.load("lightning_logs/version_0/checkpoints/best.ckpt")
        classifier.predict("photo.jpg")  # [("cat", 0.93), ("dog", 0.05), ...]
    """

    def __init__(
        self,
        model: ImageClassifier,
        accelerator: str = "auto",
        max_megapixels: float = MAX_MEGAPIXELS,
        mirrored: bool = False,
    ) -> None:
        check("max_megapixels", max_megapixels, lambda x: x > 0, "a positive number")
        self.max_megapixels = max_megapixels
        self.model = model.eval().to(_device(accelerator))
        self._predicting: nn.Module = Mirrored(self.model) if mirrored else self.model
        self.class_names = model.class_names
        self.size = model.geometry.size

    def __repr__(self) -> str:
        height, width = self.size
        count = len(self.class_names)
        names = ", ".join(self.class_names[:MAX_NAMES_SHOWN])
        if count > MAX_NAMES_SHOWN:
            names += ", ..."
        return (
            f"Classifier({self.model.backbone}, {count} classes: {names}; "
            f"{height} x {width} pixels, {self.model.device})"
        )

    @classmethod
    def load(
        cls,
        ckpt: str | Path,
        accelerator: str = "auto",
        max_megapixels: float = MAX_MEGAPIXELS,
        mirrored: bool = False,
    ) -> "Classifier":
        """Load the classifier of a checkpoint.

        Args:
            ckpt: A checkpoint of `fit`.
            accelerator: As for `Classifier`.
            max_megapixels: As for `Classifier`.
            mirrored: As for `Classifier`.

        Raises:
            UserError: The file is missing, damaged or not a checkpoint of this project.
        """
        return cls(load_classifier(ckpt), accelerator, max_megapixels, mirrored)

    @overload
    def predict(self, images: Picture, top_k: int = 5) -> list[ClassShare]: ...
    @overload
    def predict(
        self, images: list[Any] | tuple[Any, ...], top_k: int = 5
    ) -> list[list[ClassShare]]: ...
    def predict(self, images: Any, top_k: int = 5) -> list[ClassShare] | list[list[ClassShare]]:
        """Return the likeliest classes of one picture or of several.

        Each picture is brought to `size` as the images of the training were, see
        `geometry.fit_image`.

        Args:
            images: A file, the bytes of a file, a PIL image of any mode, a uint8 array [H, W, 3],
                or a tensor [3, H, W] of uint8 or of floats in [0, 1], all RGB; or a list of these.
            top_k: Number of classes to return, if there are so many.

        Returns:
            Names with probabilities in [0, 1], the likeliest first. For a list, a list of these.

        Raises:
            UserError: A picture is of another kind, or a file cannot be read as an image.
        """
        if isinstance(images, list | tuple):
            return [prediction.classes for prediction in self.stream(images, top_k)]
        return next(self.stream([images], top_k)).classes

    def stream(
        self,
        images: Iterable[Picture],
        top_k: int = 5,
        batch_size: int = 64,
        on_error: Callable[[UserError], object] | None = None,
    ) -> Iterator[ImagePrediction]:
        """Yield predictions in the order of the pictures. Two batches are in memory at a time.

        Args:
            images: Pictures as for `predict`; there may be any number of them.
            top_k: Number of classes to return, if there are so many.
            batch_size: Number of pictures that the network sees at once.
            on_error: Called with the error of a picture that cannot be read, which is then left
                out. None raises the error.

        Raises:
            UserError: `top_k` or `batch_size` is less than 1, or see `on_error`.
        """
        check("top_k", top_k, lambda n: n >= 1, "1 or more")
        check("batch_size", batch_size, lambda n: n >= 1, "1 or more")
        images = iter(images)
        with ThreadPoolExecutor(cores()) as pool:
            batch = self._start_decoding(pool, images, batch_size)
            while batch:
                # Threads decode the next batch while the network looks at this one.
                next_batch = self._start_decoding(pool, images, batch_size)
                yield from self._predict_batch(batch, top_k, on_error)
                batch = next_batch

    def _start_decoding(
        self, pool: ThreadPoolExecutor, images: Iterator[Picture], batch_size: int
    ) -> Batch:
        batch = []
        for image in islice(images, batch_size):
            batch.append((image, pool.submit(self._decode, image)))
        return batch

    def _decode(self, image: Picture) -> np.ndarray:
        """Return any picture as the network was trained on images, uint8 [3, H, W], RGB."""
        geometry = self.model.geometry
        if isinstance(image, str | Path | bytes):
            return read_image(
                image, self.size, self.max_megapixels, geometry.fit, geometry.grey_range
            )
        return to_pixels(_to_pil(image), self.size, geometry.fit, geometry.grey_range)

    def _predict_batch(
        self, batch: Batch, top_k: int, on_error: Callable[[UserError], object] | None
    ) -> Iterator[ImagePrediction]:
        sources = []
        arrays = []
        for source, future in batch:
            try:
                pixels = future.result()
            except UserError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            sources.append(source)
            arrays.append(pixels)
        if arrays:
            classes = self._likeliest_classes(np.stack(arrays), top_k)
            yield from map(ImagePrediction, sources, arrays, classes)

    @torch.inference_mode()
    def _likeliest_classes(self, pixels: np.ndarray, top_k: int) -> list[list[ClassShare]]:
        images = to_float(torch.from_numpy(pixels).to(self.model.device))
        logits = self._predicting(images)
        # In the order of the undivided logits, because a division may round two of them to one.
        labels = logits.topk(min(top_k, len(self.class_names))).indices
        probabilities = (logits / self.model.temperature).softmax(1)
        shares = probabilities.gather(1, labels)
        rows = []
        for row_labels, row_shares in zip(labels.tolist(), shares.tolist(), strict=True):
            names = [self.class_names[label] for label in row_labels]
            rows.append(list(zip(names, row_shares, strict=True)))
        return rows


def _to_pil(image: Picture) -> Image.Image:
    """Return a picture that is no file as a PIL image."""
    picture = None
    if isinstance(image, Tensor):
        picture = _from_tensor(image)
    elif isinstance(image, np.ndarray):
        picture = _from_array(image)
    elif isinstance(image, Image.Image):
        picture = image
    if picture is None:
        raise _not_a_picture(image)
    return picture


def _from_tensor(image: Tensor) -> Image.Image | None:
    """Return a tensor [3, H, W] of uint8 or of floats in [0, 1] as a PIL image, else None."""
    if image.ndim != 3 or len(image) != 3:
        return None
    image = image.detach().cpu()
    if image.is_floating_point():
        if not bool(((image >= 0) & (image <= 1)).all()):
            return None
        image = (255 * image).round().byte()
    return _from_array(image.permute(1, 2, 0).numpy())


def _from_array(image: np.ndarray) -> Image.Image | None:
    """Return a uint8 array [H, W, 3] as a PIL image, else None."""
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        return None
    return Image.fromarray(np.ascontiguousarray(image))


def _not_a_picture(image: Any) -> UserError:
    words = [type(image).__name__]
    for attribute in ("dtype", "shape"):
        if hasattr(image, attribute):
            words.append(str(getattr(image, attribute)))
    return UserError(
        "An image is a path, a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W] of uint8 "
        f"or of floats in [0, 1], not this {' '.join(words)}."
    )


def _device(accelerator: str) -> torch.device:
    """Return the device of an accelerator's name.

    Raises:
        UserError: There is no such accelerator.
    """
    available = torch.accelerator.current_accelerator(check_available=True)
    if available and accelerator in ("auto", "gpu", available.type):
        return available
    if accelerator in ("auto", "cpu"):
        return torch.device("cpu")
    choices = f"auto, cpu or {available.type}" if available else "auto, cpu"
    raise UserError(f"There is no accelerator {accelerator!r} here: take {choices}.")
