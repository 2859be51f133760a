"""How long a user waits for the first step: `python -m benchmarks.startup [options of fit]`.

Processes take turns: one that only imports torch, one that imports torchvision as well, and `fit` up to the end of its
first step of training. The images are the drawn ones unless the options name others; they are drawn or decoded before.
"""

import subprocess
import sys
import tempfile
import time

import torch

ROUNDS = 5
FIRST_STEP = """
import os, sys
from lightning.pytorch import Callback
from cifar_transfer.training.cli import FitCLI

class Stop(Callback):
    def on_train_batch_end(self, *_):
        os._exit(0)

cli = FitCLI(sys.argv[1:])
cli.trainer.callbacks.append(Stop())
cli.trainer.fit(cli.model, cli.datamodule)
"""


def main() -> None:
    """Print the seconds of each, median and range."""
    with tempfile.TemporaryDirectory() as folder:
        options = sys.argv[1:] or ["--data=ShapesDataModule", "--data.train_images=640", "--data.test_images=100"]
        fit = [FIRST_STEP, "--model.weights=none", f"--trainer.default_root_dir={folder}", *options]
        contestants = {
            "import torch": ["import torch"],
            "import torchvision": ["import torchvision"],
            "first step": fit,
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(ROUNDS + 1):
            for name, arguments in contestants.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", *arguments], check=True, capture_output=True)
                if turn:  # the first fills the caches of the file system
                    times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        print(f"{name:20} {torch.tensor(values).median():5.1f} s   ({min(values):.1f} to {max(values):.1f})")
    beyond = torch.tensor(times["first step"]) - torch.tensor(times["import torch"])
    print(f"{'beyond torch':20} {beyond.median():5.1f} s   ({beyond.min():.1f} to {beyond.max():.1f})")


if __name__ == "__main__":
    main()
