"""The logger that a run has unless told otherwise: TensorBoard's event files, in its folder."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from cifar_transfer.training.lightning_internals import silent_experiment
from cifar_transfer.training.run import Progress, RunFolder

FINAL = "result/"  # before the name of a score of the best checkpoint
# Figures that have other names in TensorBoard, which sorts by them and opens the first groups.
TENSORBOARD_TAGS = {
    "train/acc": "accuracy/train",
    "train/acc_step": "accuracy/train_step",
    "val/acc": "accuracy/val",
    "val/acc_step": "accuracy/val_step",
    "train/loss_epoch": "loss/train",
    "train/loss": "loss/train_step",
    "val/loss": "loss/val",
    "val/loss_step": "loss/val_step",
}


class RunLogger(TensorBoardLogger):
    """Log a run into its folder, for TensorBoard.

    Nothing is written before the run has started. Lightning makes the writer and logs
    hyper-parameters before data, network and checkpoint are checked, and a run that is then
    refused would leave files. The chart of epochs by step, which Lightning logs for each figure,
    is left out.

    Args:
        folder: Folder of the run, which is a callback of the same Trainer.
        progress: How far a run had come that continues in place; None for a new one. What it has
            logged since is logged again.
    """

    def __init__(self, folder: RunFolder, progress: Progress | None = None) -> None:
        options: dict[str, Any] = {}
        if progress is not None:
            options["purge_step"] = _first_repeated_step(progress)
        logs = folder.path.parent
        super().__init__(str(logs.parent), logs.name, default_hp_metric=False, **options)
        self._folder = folder

    @property
    def version(self) -> str:
        """Name of the folder of the run."""
        return self._folder.path.name

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; one that writes nothing on other ranks and before the start."""
        if not self._folder.started:
            return silent_experiment()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures, under other names where `TENSORBOARD_TAGS` has some.

        Args:
            metrics: Figures by their names.
            step: The step, from 0; of figures of an epoch, the epoch, from 1.
        """
        if not self._folder.started:
            return
        figures = {}
        for name, value in metrics.items():
            if name != "epoch":
                figures[TENSORBOARD_TAGS.get(name, name)] = value
        super().log_metrics(figures, step)

    @rank_zero_only
    def save(self) -> None:
        """Write what is held back, once the run has started."""
        if self._folder.started:
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is held back, and close the files."""
        super().finalize(status)
        self.save()


def _first_repeated_step(progress: Progress) -> int:
    """Return the step from which readers of event files forget what was logged before.

    Figures of epochs have the epoch as their step. Those of whole epochs are not logged again, and
    there are as many epochs as steps where an epoch has one step.
    """
    return max(progress.steps, progress.epochs + 1)
