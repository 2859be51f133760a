"""How long a user waits for an answer: `python -m benchmarks.startup [FOLDER OF ANOTHER CHECKOUT]`.

Processes take turns, each timed from its start: imports, to have something to compare with; help,
version, a misspelt option and the list of commands; the first letter that `fit` prints, and the end
of its first step of training on drawn images; the prediction of one image by ResNet18.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.turns import alternate

MAX_ROUNDS = 5
MAX_SECONDS = 500
THIS_CHECKOUT = Path(__file__).parents[1]
FIRST_STEP = """
import os, sys
from lightning.pytorch import Callback
from cifar_transfer.cli.fit_cli import FitCLI

class Stop(Callback):
    def on_train_batch_end(self, *_):
        os._exit(0)

cli = FitCLI(sys.argv[1:])
cli.trainer.callbacks.append(Stop())
cli.trainer.fit(cli.model, cli.datamodule)
"""
CHECKPOINT = """
from lightning import Trainer
from PIL import Image
from cifar_transfer import TransferClassifier

Image.linear_gradient("L").save("photo.png")
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.strategy.connect(TransferClassifier("resnet18", "none"))
trainer.save_checkpoint("best.ckpt")
"""
JOB = [
    "--model.weights=none",
    "--data=ShapesDataModule",
    "--data.train_images=640",
    "--data.test_images=100",
]
IMPORTS = {
    "import torch": ["-c", "import torch"],
    "import torch, torchvision": ["-c", "import torch, torchvision"],
}
PROGRAMS = {
    "list of commands": ["-m", "cifar_transfer"],
    "fit --help": ["-m", "cifar_transfer.fit", "--help"],
    "fit --version": ["-m", "cifar_transfer.fit", "--version"],
    "fit --epochs=3": ["-m", "cifar_transfer.fit", "--epochs=3"],
    "predict --help": ["-m", "cifar_transfer", "predict", "--help"],
    "fit, first letter": ["-m", "cifar_transfer.fit", *JOB],
    "fit, first step": ["-c", FIRST_STEP, *JOB],
    "predict one image": ["-m", "cifar_transfer", "predict", "photo.png", "--ckpt=best.ckpt"],
}


def run(arguments: Sequence[str], checkout: Path, folder: str, first_letter: bool) -> None:
    """Run Python in a folder, to its end or to the first letter that it prints."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        assert process.stdout is not None
        if first_letter:
            process.stdout.read(1)
            process.kill()
        else:
            process.stdout.read()


def calls(folder: str, other_checkout: Path | None) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name: imports, and the programs of one checkout or of two."""
    works: dict[str, Callable[[], None]] = {}
    for name, arguments in IMPORTS.items():
        works[name] = partial(run, arguments, THIS_CHECKOUT, folder, False)
    for name, arguments in PROGRAMS.items():
        first_letter = name.endswith("letter")
        works[name] = partial(run, arguments, THIS_CHECKOUT, folder, first_letter)
        if other_checkout is not None:
            there = f"{name}, there"
            works[there] = partial(run, arguments, other_checkout, folder, first_letter)
    return works


def main(args: Sequence[str]) -> None:
    """Print the seconds of each, median and range."""
    other_checkout = Path(args[0]).resolve() if args else None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHECKPOINT]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        times = alternate(calls(folder, other_checkout), MAX_ROUNDS, MAX_SECONDS)
    for name, seconds in times.items():
        median = sorted(seconds)[len(seconds) // 2]
        print(f"| {name:32} | {median:5.2f} s ({min(seconds):.2f} to {max(seconds):.2f}) |")


if __name__ == "__main__":
    main(sys.argv[1:])
