"""Loss and accuracy of a checkpoint: `python -m cifar_transfer.evaluate --ckpt FILE [--split val]`."""

import sys
from typing import Literal

from jsonargparse import auto_cli
from lightning import Trainer

from cifar_transfer import checkpoints
from cifar_transfer.errors import one_sentence


def evaluate(
    ckpt: str,
    split: Literal["test", "val"] = "test",
    root: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    mirrored: bool = False,
) -> dict[str, float]:
    """Evaluate a checkpoint on the data it was trained with.

    Args:
        ckpt: The checkpoint.
        split: "test", or "val" for the very images that were held out in its training.
        root: Where the data are now, if they have moved.
        accelerator: As in Lightning's Trainer.
        devices: As in Lightning's Trainer.
        precision: As in Lightning's Trainer.
        mirrored: Also predict from each image and its mirror image together, for twice the time.

    Returns:
        `test/loss` and `test/acc`, or `val/loss` and `val/acc`, and with `mirrored` also `test/mirrored_acc`; accuracy
        as a share of 1.
    """
    data = checkpoints.load_data(checkpoints.read(ckpt), **({"root": root} if root else {}))
    model = checkpoints.load(ckpt)
    model.mirrored = mirrored
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,  # type: ignore[arg-type] # Lightning checks it
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    run = trainer.test if split == "test" else trainer.validate
    run(model, data, verbose=False)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        for name, value in figures.items():
            print(f"{name}  {value:.2%}" if name.endswith("acc") else f"{name} {value:.4f}")
    return figures


if __name__ == "__main__":
    with one_sentence():
        auto_cli(evaluate, as_positional=False)
