"""The logger of a run: TensorBoard's event files and `metrics.csv`, in the folder of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from cifar_transfer.base.console import counted
from cifar_transfer.training.classifier import STEPS_FIGURE
from cifar_transfer.training.lightning_internals import silent_experiment
from cifar_transfer.training.metrics_file import MetricsFile, trim_metrics
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
NAMES = {tag: name for name, tag in TENSORBOARD_TAGS.items()}


class RunLogger(TensorBoardLogger):
    """Log a run into its folder, for TensorBoard and in `metrics.csv`.

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
        self._progress = progress
        self._metrics: MetricsFile | None = None

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
        """Log figures.

        Args:
            metrics: Figures by their names. Those of an epoch have `steps` among them, which is
                the number of steps so far.
            step: The step, from 0; of figures of an epoch, the epoch, from 1.
        """
        if not self._folder.started:
            return
        figures = dict(metrics)
        epoch = figures.pop("epoch", None)
        super().log_metrics(
            {TENSORBOARD_TAGS.get(name, name): value for name, value in figures.items()}, step
        )
        if self._metrics is None:
            self._metrics = self._open_metrics()
        if STEPS_FIGURE in figures:
            last_step = int(figures.pop(STEPS_FIGURE)) - 1
            self._metrics.add(step, last_step, figures)
        elif epoch is None:
            self._metrics.add(None, step, figures)
        else:
            self._metrics.add(counted(int(epoch)), step, figures)

    def _open_metrics(self) -> MetricsFile:
        run = Path(self.log_dir)
        if self._progress is not None:
            trim_metrics(run, self._progress.epochs, self._progress.steps)
        return MetricsFile(run)

    @rank_zero_only
    def save(self) -> None:
        """Write what is held back, once the run has started."""
        if not self._folder.started:
            return
        super().save()
        if self._metrics is not None:
            self._metrics.flush()

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
