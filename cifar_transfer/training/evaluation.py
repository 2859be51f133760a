"""The scores of a checkpoint: those of exactly the weights in its file."""

from pathlib import Path

from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from cifar_transfer.data.module import Split
from cifar_transfer.results.predictions import CollectPredictions
from cifar_transfer.training.checkpoint import load_model


def evaluate_checkpoint(
    trainer: Trainer,
    ckpt: str | Path,
    data: LightningDataModule,
    split: Split,
    collect: CollectPredictions | None = None,
    mirrored: bool = False,
) -> dict[str, float]:
    """Score a checkpoint on all images of a split.

    The network is made anew from the file. The trainer gives devices, precision and progress bar; its other callbacks,
    loggers and limits of batches are left out, because callbacks may exchange the weights (as those that average them
    do), and a limit would score only the first images.

    Args:
        trainer: May have trained before; it is left as it was.
        ckpt: The checkpoint, which every process reads.
        data: Has the images of `split`, "val" or "test".
        collect: Keeps the predictions.
        mirrored: Also score each image and its mirror image together.

    Returns:
        `SPLIT/loss` and `SPLIT/acc`, where classes are unequal also `SPLIT/balanced_accuracy` and `SPLIT/macro_f1`, and
        with `mirrored` also `SPLIT/mirrored_acc`; all but the loss as shares of 1.

    Raises:
        UserError: The checkpoint cannot be read or is unfit for the data.
    """
    model = load_model(ckpt)
    model.mirrored = mirrored
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
    bare = {"callbacks": [*bars, collect] if collect else bars, "loggers": []}
    bare |= {"limit_val_batches": 1.0, "limit_test_batches": 1.0}  # type: ignore[dict-item]
    before = {name: getattr(trainer, name) for name in bare}
    run = trainer.test if split == "test" else trainer.validate
    try:
        for name, value in bare.items():
            setattr(trainer, name, value)
        run(model, data, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
