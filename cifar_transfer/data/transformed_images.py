"""Training images through transforms of torchvision v2, or others, one image at a time."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from cifar_transfer.base.errors import UserError
from cifar_transfer.data.augment import step_seed
from cifar_transfer.data.images import Batch, Images

Transform = Callable[[Tensor], Tensor]  # from uint8 [3, H, W] to the same
# In place of the rank among the numbers that give a seed, which tells these seeds from those of
# steps.
NO_RANK = 2**31


class TransformedImages(Images):
    """Images that transforms change anew in each epoch.

    An index stands for an epoch and a row, `epoch * len(images) + row`, as the sampler gives it:
    worker processes live on from epoch to epoch, and learn of the next one in no other way. What a
    transform draws follows from seed, epoch and row, so that a resumed run repeats it.

    Args:
        images: The images before the transforms.
        transforms: Functions from uint8 [3, H, W], RGB, to the same, which are applied in turn.
            Chance may come from torch, NumPy's global generator or `random`.
        seed: Another seed gives other chance.

    Raises:
        UserError: A transform returns something else than uint8 of the shape that it was given.
    """

    on_the_fly = True  # transforms take as long as decoding, so that worker processes pay

    def __init__(self, images: Images, transforms: Sequence[Transform], seed: int) -> None:
        super().__init__(images.labels)
        self.images = images
        self.transforms = list(transforms)
        self.seed = seed
        self.names = images.names
        if len(images):
            self.__getitems__([0])  # so that an unfit transform is refused before training

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return transformed images, uint8 [B, 3, H, W], and labels, int64 [B]."""
        count = len(self.images)
        rows = [index % count for index in indices]
        images, labels = self.images.__getitems__(rows)
        transformed = []
        for image, index in zip(images, indices, strict=True):
            epoch, row = divmod(index, count)
            with _seeded(step_seed(self.seed, epoch, row, NO_RANK)):
                transformed.append(self._transform(image))
        return torch.stack(transformed), labels

    def _transform(self, image: Tensor) -> Tensor:
        result = image
        for transform in self.transforms:
            result = transform(result)
            is_image = isinstance(result, Tensor) and result.shape == image.shape
            if not is_image or result.dtype != torch.uint8:
                raise UserError(
                    f"{describe(transform)} makes {_form(result)} of uint8 {list(image.shape)}: "
                    f"take transforms that leave type and shape as they are. Resizing is "
                    f"data.decode_size, normalising model.normalize."
                )
        return result

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Return the images as they are before the transforms, uint8 [B, 3, H, W]."""
        return self.images.pixels(rows)

    def marks(self) -> np.ndarray:
        """Return the numbers of the images before the transforms, uint32 [N]."""
        return self.images.marks()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and `random` for a while; afterwards they go on as if nothing had been."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # `torch.manual_seed` would also seed the devices.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.random.set_rng_state(torch_state)


def describe(transform: Transform) -> str:
    """Return a text for a transform, the same in each process: its name, and its options if known.

    The text of a function has its address, which is another one each time.
    """
    if isinstance(transform, nn.Module):
        return str(transform)
    return getattr(transform, "__qualname__", type(transform).__qualname__)


def _form(result: object) -> str:
    if isinstance(result, Tensor):
        dtype = str(result.dtype).removeprefix("torch.")
        return f"{dtype} {list(result.shape)}"
    return f"a {type(result).__name__}"
