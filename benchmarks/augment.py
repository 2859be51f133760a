"""Time per image of `Augmentation` beside other libraries: `python -m benchmarks.augment`.

At 32 pixels it is the default augmentation, and at 96 and 224 pixels that of photographs, `photos`.
The reference is what a data loader's worker does: torchvision's transforms on one image at a time,
on one thread. torchvision's on the whole batch draw one set of parameters for all of it. kornia and
albumentations take part where they are installed.
"""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.turns import alternate, table
from cifar_transfer.data.augment import PRESETS, Augmentation

BATCH_SIZES = {32: 64, 96: 32, 224: 16}  # images, by their side in pixels
MAX_ROUNDS = 40
MAX_SECONDS = 30  # for each side; no new round begins after so long

Work = Callable[[], object]


def torchvision_pipeline(augment: Augmentation, side: int) -> v2.Compose:
    """Return what an `Augmentation` stands for, from uint8 to float32 [3, H, W] in [0, 1]."""
    colours = v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
    if not augment.crops_parts:
        geometry = [
            v2.RandomCrop(side, padding=augment.padding),
            v2.RandomHorizontalFlip(augment.flip),
            colours,
            v2.RandomRotation(augment.degrees),
        ]
    else:
        geometry = [
            v2.RandomResizedCrop(side, scale=tuple(augment.crop_scale)),
            v2.RandomHorizontalFlip(augment.flip),
            colours,
        ]
    return v2.Compose([*geometry, v2.ToDtype(torch.float32, scale=True)])


def kornia_pipeline(augment: Augmentation, side: int) -> torch.nn.Module:
    """Return the same of kornia, which works on a float batch, with parameters for each image."""
    from kornia import augmentation

    brightness, contrast, saturation = augment.brightness, augment.contrast, augment.saturation
    colours = augmentation.ColorJiggle(brightness, contrast, saturation, augment.hue, p=1.0)
    flip = augmentation.RandomHorizontalFlip(augment.flip)
    if not augment.crops_parts:
        crop = augmentation.RandomCrop((side, side), padding=augment.padding)
        rotation = augmentation.RandomRotation(augment.degrees, resample="nearest", p=1.0)
        return augmentation.AugmentationSequential(crop, flip, colours, rotation)
    crop = augmentation.RandomResizedCrop((side, side), scale=tuple(augment.crop_scale))
    return augmentation.AugmentationSequential(crop, flip, colours)


def albumentations_pipeline(
    augment: Augmentation, side: int
) -> Callable[..., dict[str, np.ndarray]]:
    """Return the same of albumentations, which works on one array at a time."""
    import albumentations as library

    colours = library.ColorJitter(
        augment.brightness, augment.contrast, augment.saturation, augment.hue, p=1.0
    )
    flip = library.HorizontalFlip(p=augment.flip)
    if not augment.crops_parts:
        crop = library.RandomCrop(side, side)
        pad = library.Pad(augment.padding)
        rotation = library.Rotate(augment.degrees, interpolation=0, p=1.0)
        return library.Compose([pad, crop, flip, colours, rotation])
    crop = library.RandomResizedCrop((side, side), scale=tuple(augment.crop_scale))
    return library.Compose([crop, flip, colours])


def contestants(side: int, all_threads: int) -> dict[str, Work]:
    """Return what augments one batch of images of this side, the reference first."""
    augment = PRESETS["cifar"] if side == 32 else PRESETS["photos"]
    batch = torch.randint(0, 256, (BATCH_SIZES[side], 3, side, side), dtype=torch.uint8)
    pipeline = torchvision_pipeline(augment, side)

    def image_by_image() -> Tensor:
        return torch.stack([pipeline(image) for image in batch])

    works: dict[str, Work] = {
        "torchvision, image by image, 1 thread": with_threads(1, image_by_image),
        "torchvision, one draw for the batch, 1 thread": with_threads(1, lambda: pipeline(batch)),
        "`Augment`, 1 thread": with_threads(1, lambda: augment(batch)),
        f"`Augment`, {all_threads} threads": with_threads(all_threads, lambda: augment(batch)),
    }
    if find_spec("kornia"):
        kornia = kornia_pipeline(augment, side)
        works["kornia, 1 thread"] = with_threads(1, lambda: kornia(batch.float() / 255))
    if find_spec("albumentations"):
        albumentations = albumentations_pipeline(augment, side)
        arrays = list(batch.permute(0, 2, 3, 1).numpy())

        def array_by_array() -> Tensor:
            results = [albumentations(image=array)["image"] for array in arrays]
            return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).float() / 255

        works["albumentations, image by image, 1 thread"] = with_threads(1, array_by_array)
    return works


def with_threads(threads: int, work: Work) -> Work:
    """Return work that uses so many threads."""

    def limited() -> None:
        torch.set_num_threads(threads)
        work()

    return limited


def main() -> None:
    """Print images per second and the ratios to the reference for each side."""
    torch.manual_seed(0)
    all_threads = torch.get_num_threads()
    for side, count in BATCH_SIZES.items():
        times = alternate(contestants(side, all_threads), MAX_ROUNDS, MAX_SECONDS)
        print(f"batches of {count} images, {side} x {side}:\n")
        print(table(times, count))
        print()
    torch.set_num_threads(all_threads)


if __name__ == "__main__":
    main()
