"""How long a user waits for an answer: `python -m benchmarks.startup [FOLDER OF ANOTHER CHECKOUT]`.

Processes take turns, each timed from its start: imports, to have something to compare with; help, version, a misspelt
option and the list of commands; the first letter that `fit` prints, and the end of its first step of training on drawn
images; the prediction of one image by ResNet18.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.turns import alternate

ROUNDS, MOST_SECONDS = 5, 500
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


def main() -> None:
    """Print the seconds of each, median and range."""
    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        job = [
            "--model.weights=none",
            "--data=ShapesDataModule",
            "--data.train_images=640",
            "--data.test_images=100",
        ]
        contestants = {
            "import torch": ["-c", "import torch"],
            "import torch, torchvision": ["-c", "import torch, torchvision"],
            "list of commands": ["-m", "cifar_transfer"],
            "fit --help": ["-m", "cifar_transfer.fit", "--help"],
            "fit --version": ["-m", "cifar_transfer.fit", "--version"],
            "fit --epochs=3": ["-m", "cifar_transfer.fit", "--epochs=3"],
            "predict --help": ["-m", "cifar_transfer", "predict", "--help"],
            "fit, first letter": ["-m", "cifar_transfer.fit", *job],
            "fit, first step": ["-c", FIRST_STEP, *job, f"--trainer.default_root_dir={folder}"],
            "predict one image": [
                "-m",
                "cifar_transfer",
                "predict",
                "photo.png",
                "--ckpt=best.ckpt",
            ],
        }

        def wait(name: str, place: Path) -> None:
            environment = os.environ | {"PYTHONPATH": str(place)}
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            command = [sys.executable, *contestants[name]]
            with subprocess.Popen(command, cwd=folder, env=environment, **streams) as process:  # type: ignore[call-overload]
                if name.endswith("letter"):
                    process.stdout.read(1)
                    process.kill()
                else:
                    process.stdout.read()

        subprocess.run(
            [sys.executable, "-c", CHECKPOINT], cwd=folder, check=True, capture_output=True
        )
        places = {"": here} | ({", there": Path(sys.argv[1]).resolve()} if sys.argv[1:] else {})
        calls = {}
        for name in contestants:
            for where, place in places.items() if "import" not in name else [("", here)]:
                calls[name + where] = lambda name=name, place=place: wait(name, place)
        for name, seconds in alternate(calls, ROUNDS, MOST_SECONDS).items():
            middle = sorted(seconds)[len(seconds) // 2]
            print(f"| {name:32} | {middle:5.2f} s ({min(seconds):.2f} to {max(seconds):.2f}) |")


if __name__ == "__main__":
    main()
