"""A trained checkpoint as a function from images to names: `Classifier.load(CHECKPOINT).predict(IMAGE)`."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar_transfer.base.errors import UserError, check
from cifar_transfer.data.geometry import Size, to_float
from cifar_transfer.data.images import MAX_MEGAPIXELS, cores, read_image, to_pixels
from cifar_transfer.network.image_classifier import ImageClassifier
from cifar_transfer.results.predictions import ImagePrediction
from cifar_transfer.training.checkpoint_file import load_classifier

Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor
Prediction = tuple[str, float]
Refuse = Callable[[UserError], object]


class Classifier:
    """A trained network with its classes' names.

    Args:
        model: As `load_classifier` gives it; put into eval mode, on the device.
        accelerator: "auto" for a GPU where there is one, "gpu" (or its kind, "cuda", "mps"), or "cpu".
        max_megapixels: A file of more million pixels is refused, before it is decoded.

    Attributes:
        names: Of the classes, in the order of the network's outputs.
        size: Height and width in pixels of the images trained on, to which each image is brought.

    Raises:
        UserError: There is no such accelerator, or a limit that is not positive.

    Example::

        classifier = Classifier.load("lightning_logs/version_0/checkpoints/best.ckpt")
        classifier.predict("photo.jpg")  # [("cat", 0.93), ("dog", 0.05), ...]
    """

    def __init__(
        self,
        model: ImageClassifier,
        accelerator: str = "auto",
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        check("max_megapixels", max_megapixels, lambda x: x > 0, "a positive number")
        self.max_megapixels = max_megapixels
        self.model = model.eval().to(_device(accelerator))
        self.names: list[str] = model.class_names
        self.size = model.geometry.size

    @classmethod
    def load(
        cls, ckpt: str | Path, accelerator: str = "auto", max_megapixels: float = MAX_MEGAPIXELS
    ) -> "Classifier":
        """That of a checkpoint of `fit`; a `UserError` says that it is missing, damaged or none."""
        return cls(load_classifier(ckpt), accelerator, max_megapixels)

    @overload
    def predict(self, images: Picture, top_k: int = 5) -> list[Prediction]: ...
    @overload
    def predict(
        self, images: list[Any] | tuple[Any, ...], top_k: int = 5
    ) -> list[list[Prediction]]: ...
    def predict(self, images: Any, top_k: int = 5) -> list[Prediction] | list[list[Prediction]]:
        """The likeliest classes of one image or of several, each resized to cover `size` and the centre cut out.

        Args:
            images: A file, or the bytes in one, a PIL image of any mode, a uint8 array [H, W, 3], a tensor [3, H, W] of
                uint8 or of floats in [0, 1], all RGB; or a list of these.
            top_k: How many classes to give, or all if there are fewer.

        Returns:
            Names with probabilities in [0, 1], the likeliest first; for a list, such a list for each image.

        Raises:
            UserError: Anything else, or a file that is no image.
        """
        if isinstance(images, list | tuple):
            return [prediction.classes for prediction in self.stream(images, top_k)]
        return next(self.stream([images], top_k)).classes

    def stream(
        self,
        images: Iterable[Picture],
        top_k: int = 5,
        batch_size: int = 64,
        refuse: Refuse | None = None,
    ) -> Iterator[ImagePrediction]:
        """Predictions in the order of the images, however many these are: two batches are in memory.

        Args:
            images: As in `predict`, with `top_k`.
            batch_size: Images that the network sees at once.
            refuse: Called with the reason for an image that cannot be read, which is then left out.

        Raises:
            UserError: `top_k` or `batch_size` is less than 1; or, without `refuse`, an image that cannot be read.
        """
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            check(name, value, lambda n: n >= 1, "1 or more")
        with ThreadPoolExecutor(cores()) as pool:
            reading = (
                (image, pool.submit(_pixels, image, self.size, self.max_megapixels))
                for image in images
            )
            batches = iter(lambda: list(islice(reading, batch_size)), [])
            # Threads decode the next batch while the network looks at this one.
            for batch, _ in pairwise(chain(batches, [[]])):
                sources, shown = [], []
                for source, future in batch:
                    try:
                        shown.append(future.result())
                        sources.append(source)
                    except UserError as error:
                        if refuse is None:
                            raise
                        refuse(error)
                if shown:
                    yield from map(
                        ImagePrediction, sources, shown, self._classes(np.stack(shown), top_k)
                    )

    @torch.inference_mode()
    def _classes(self, pixels: np.ndarray, top_k: int) -> list[list[Prediction]]:
        images = to_float(torch.from_numpy(pixels).to(self.model.device))
        best = self.model(images).softmax(1).topk(min(top_k, len(self.names)))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.names[i], share) for i, share in zip(*row, strict=True)] for row in rows]


def _pixels(image: Picture, size: Size, max_megapixels: float) -> np.ndarray:
    """Any picture as uint8 [3, H, W] of a size, RGB."""
    if isinstance(image, str | Path | bytes):
        return read_image(image, size, max_megapixels)
    given = image
    if isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3:
        image = image.detach().cpu()
        if image.is_floating_point() and bool(((image >= 0) & (image <= 1)).all()):
            image = (255 * image).round().byte()
        if image.dtype == torch.uint8:
            image = image.permute(1, 2, 0).numpy()
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.shape[2:] == (3,)
        and image.size
    ):
        image = Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        return to_pixels(image, size)
    what = [
        type(given).__name__,
        *(str(getattr(given, part)) for part in ("dtype", "shape") if hasattr(given, part)),
    ]
    raise UserError(
        f"An image is a path, a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W] of uint8 or of floats in "
        f"[0, 1], not this {' '.join(what)}."
    )


def _device(accelerator: str) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found and accelerator in ("auto", "gpu", found.type):
        return found
    if accelerator in ("auto", "cpu"):
        return torch.device("cpu")
    kinds = f"auto, cpu or {found.type}" if found else "auto, cpu"
    raise UserError(f"There is no accelerator {accelerator!r} here: take {kinds}.")
