"""A contestant of `benchmarks.peers`: timm's `train.py`, as it is in a checkout.

Two of its functions are wrapped in a clock. It has no frozen phase: everything trains in all
epochs. Its nearest to a crop after padding is a crop of three quarters of the area or more, which
it enlarges.
"""

import importlib.util
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.peer_job import DEVIATION, MEAN, WEIGHT_DECAY, PeerJob, print_epoch

SCRIPT = "train.py"
MIN_CROP_AREA = 0.77  # of the image: 28 of 32 pixels, squared


def options(job: PeerJob) -> list[str]:
    """Return the options of `train.py` for a job."""
    return [
        f"--data-dir={job.root}",
        "--train-split=train",
        "--val-split=test",
        f"--num-classes={job.num_classes}",
        "--model=resnet18",
        "--pretrained",
        f"--pretrained-path={job.weights}",
        *("--input-size", "3", str(job.image_size), str(job.image_size)),
        *("--mean", *map(str, MEAN)),
        *("--std", *map(str, DEVIATION)),
        "--crop-pct=1",
        *("--scale", str(MIN_CROP_AREA), "1"),
        *("--ratio", "1", "1"),
        "--color-jitter=0",
        "--train-interpolation=bilinear",
        "--smoothing=0",
        "--opt=adamw",
        f"--lr={job.lr}",
        f"--weight-decay={WEIGHT_DECAY}",
        "--sched=cosine",
        "--sched-on-updates",
        "--warmup-epochs=0",
        f"--epochs={job.epochs}",
        f"--batch-size={job.batch_size}",
        f"--workers={job.workers}",
        f"--seed={job.seed}",
        f"--device={job.device}",
    ]


def load(checkout: Path) -> ModuleType:
    """Return the script as a module, with the timm of its checkout."""
    sys.path.insert(0, str(checkout))
    spec = importlib.util.spec_from_file_location("timm_train", checkout / SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def print_epochs(script: ModuleType) -> None:
    """Let the script print a line for each epoch that it validates."""
    train_one_epoch = script.train_one_epoch
    validate = script.validate
    seconds = 0.0
    num_images = 0

    def timed_train_one_epoch(
        epoch: int, model: Any, loader: Any, *args: Any, **options: Any
    ) -> Mapping[str, float]:
        nonlocal seconds, num_images
        start = time.perf_counter()
        figures = train_one_epoch(epoch, model, loader, *args, **options)
        seconds = time.perf_counter() - start
        num_images = len(loader) * loader.loader.batch_size  # without an incomplete batch
        return figures

    def printing_validate(*args: Any, **options: Any) -> Mapping[str, float]:
        figures = validate(*args, **options)
        print_epoch("unfrozen", num_images, seconds, figures["top1"] / 100)
        return figures

    script.train_one_epoch = timed_train_one_epoch  # type: ignore[attr-defined] # of a module
    script.validate = printing_validate  # type: ignore[attr-defined]


def main(job: PeerJob, checkout: Path) -> None:
    """Train, and validate on the test images after each epoch."""
    script = load(checkout)
    print_epochs(script)
    sys.argv = [str(checkout / SCRIPT), *options(job)]
    script.main()


if __name__ == "__main__":
    main(PeerJob.from_json(sys.argv[1]), Path(sys.argv[2]))
