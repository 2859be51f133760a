"""Compare the time per image of `cifar_transfer.augment` with torchvision's pipeline: `python -m benchmarks.augment`.

The contestants take turns, so that whatever else the machine is doing slows all of them alike. The reference is what a
data loader's worker does: torchvision's transforms on one PIL image at a time, then `ToTensor`, on one thread.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision import transforms

from cifar_transfer.data.augment import Augment

BATCH, SIZE, ROUNDS = 64, 32, 60
MOST_SECONDS = 40
"""No new round begins after so long: where cores are shared, more threads than free cores can be very slow."""


def torchvision_pipeline() -> transforms.Compose:
    """Build the per-image pipeline that `Augment()` stands for: PIL image to float32 [3, SIZE, SIZE] in [0, 1]."""
    return transforms.Compose(
        [
            transforms.RandomCrop(SIZE, padding=4),
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
    """Print a table: microseconds per image (median and quartiles over rounds), and how many times as fast."""
    torch.manual_seed(0)
    all_threads = torch.get_num_threads()
    batch = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    pictures = [transforms.functional.to_pil_image(image) for image in batch]
    pipeline, augment = torchvision_pipeline(), Augment()
    contestants: dict[str, tuple[Callable[[], Tensor], int]] = {
        "torchvision, image by image, 1 thread": (
            lambda: torch.stack([pipeline(p) for p in pictures]),
            1,
        ),
        "Augment, batch at once, 1 thread": (lambda: augment(batch), 1),
        f"Augment, batch at once, {all_threads} threads": (lambda: augment(batch), all_threads),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start, rounds = time.perf_counter(), 0
    while rounds < ROUNDS and time.perf_counter() - start < MOST_SECONDS:
        rounds += 1
        for name, (work, threads) in contestants.items():
            seconds(
                work, threads
            )  # what the turn before left in the caches and thread pools is not this one's
            times[name].append(seconds(work, threads) / BATCH * 1e6)

    print(f"batches of {BATCH} images, {SIZE} x {SIZE}; {rounds} rounds")
    print(f"{'':40}{'us/image':>10}{'quartiles':>22}{'times as fast':>16}")
    reference = 0.0
    for name, values in times.items():
        low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        reference = reference or median
        print(f"{name:40}{median:10.1f}{f'{low:.1f} to {high:.1f}':>22}{reference / median:16.1f}")


if __name__ == "__main__":
    main()
