"""The logger that writes `metrics.csv` into the folder of a run, beside whatever others it has."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from cifar_transfer.base.console import counted
from cifar_transfer.results.run_metrics import STEPS_FIGURE
from cifar_transfer.training.metrics_file import MetricsFile, trim_metrics
from cifar_transfer.training.run import Progress, RunFolder


class MetricsLogger(Logger):
    """Log every figure of a run into its `metrics.csv`, from which its curves are drawn.

    Args:
        folder: Folder of the run. A `RunFolder`, which is a callback of the same Trainer, is
            written into once the run has started.
        progress: How far a run had come that continues in place; None for a new one. What it has
            logged since is logged again.
    """

    def __init__(self, folder: RunFolder | Path, progress: Progress | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._progress = progress
        self._metrics: MetricsFile | None = None

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        if isinstance(self._folder, RunFolder):
            return self._folder.path
        return self._folder

    @property
    def save_dir(self) -> str:
        """Folder of the run, below which Lightning looks for `name` and `version`."""
        return str(self.folder)

    @property
    def name(self) -> str:
        """Nothing: the run has no folder within its folder."""
        return ""

    @property
    def version(self) -> str:
        """Nothing, as `name`."""
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: `config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures.

        Args:
            metrics: Figures by their names. Those of an epoch have `steps` among them, which is
                the number of steps so far.
            step: The step, from 0; of figures of an epoch, the epoch, from 1.
        """
        if isinstance(self._folder, RunFolder) and not self._folder.started:
            return
        if self._metrics is None:
            self._metrics = self._open()
        figures = dict(metrics)
        epoch = figures.pop("epoch", None)
        if STEPS_FIGURE in figures:
            last_step = int(figures.pop(STEPS_FIGURE)) - 1
            self._metrics.add(step, last_step, figures)
        elif epoch is None:
            self._metrics.add(None, step, figures)
        else:
            self._metrics.add(counted(int(epoch)), step, figures)

    def _open(self) -> MetricsFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._progress is not None:
            trim_metrics(self.folder, self._progress.epochs, self._progress.steps)
        return MetricsFile(self.folder)

    @rank_zero_only
    def save(self) -> None:
        """Write what is held back."""
        if self._metrics is not None:
            self._metrics.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is held back."""
        self.save()
