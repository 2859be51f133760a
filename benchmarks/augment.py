"""Time per image of `Augment` beside torchvision's pipeline: `python -m benchmarks.augment`.

The contestants take turns, so that whatever else the machine is doing slows all of them alike. The
reference is what a data loader's worker does: torchvision's transforms on one PIL image at a time,
then `ToTensor`, on one thread.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision import transforms

from benchmarks.turns import QUARTILES
from cifar_transfer.data.augment import Augment

BATCH_SIZE = 64
IMAGE_SIDE = 32  # pixels
MAX_ROUNDS = 60
# No new round begins after so long. Where cores are shared, more threads than free cores can be
# very slow.
MAX_SECONDS = 40


def torchvision_pipeline() -> transforms.Compose:
    """Return what `Augment()` stands for, from a PIL image to float32 [3, H, W] in [0, 1]."""
    return transforms.Compose(
        [
            transforms.RandomCrop(IMAGE_SIDE, padding=4),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
            transforms.RandomRotation(15),
            transforms.ToTensor(),
        ]
    )


def seconds(work: Callable[[], Tensor], threads: int) -> float:
    """Time one call of `work` with so many threads."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print microseconds per image, median and quartiles over rounds, and the ratios."""
    torch.manual_seed(0)
    all_threads = torch.get_num_threads()
    batch = torch.randint(0, 256, (BATCH_SIZE, 3, IMAGE_SIDE, IMAGE_SIDE), dtype=torch.uint8)
    pictures = [transforms.functional.to_pil_image(image) for image in batch]
    pipeline = torchvision_pipeline()
    augment = Augment()

    def image_by_image() -> Tensor:
        return torch.stack([pipeline(picture) for picture in pictures])

    def batch_at_once() -> Tensor:
        return augment(batch)

    contestants: dict[str, tuple[Callable[[], Tensor], int]] = {
        "torchvision, image by image, 1 thread": (image_by_image, 1),
        "Augment, batch at once, 1 thread": (batch_at_once, 1),
        f"Augment, batch at once, {all_threads} threads": (batch_at_once, all_threads),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    rounds = 0
    while rounds < MAX_ROUNDS and time.perf_counter() - start < MAX_SECONDS:
        rounds += 1
        for name, (work, threads) in contestants.items():
            seconds(work, threads)  # what the turn before left in caches is not this one's
            times[name].append(seconds(work, threads) / BATCH_SIZE * 1e6)
    torch.set_num_threads(all_threads)

    print(f"batches of {BATCH_SIZE} images, {IMAGE_SIDE} x {IMAGE_SIDE}; {rounds} rounds")
    print(f"{'':40}{'us/image':>10}{'quartiles':>22}{'times as fast':>16}")
    reference = 0.0
    for name, values in times.items():
        low, median, high = torch.tensor(values).quantile(QUARTILES).tolist()
        reference = reference or median
        quartiles = f"{low:.1f} to {high:.1f}"
        print(f"{name:40}{median:10.1f}{quartiles:>22}{reference / median:16.1f}")


if __name__ == "__main__":
    main()
