"""What a run tells: a line an epoch, the graph, comparable hyper-parameters, event files without overlaps."""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from cifar_transfer.classifier import EPOCH_FIGURES

EPOCH_TAGS = {*EPOCH_FIGURES, "lr", "trainable_parameters"}


class Report(Callback):
    """One line an epoch on the terminal, and the network's graph in TensorBoard."""

    def __init__(self) -> None:
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the graph of a run that begins (one that continues has it)."""
        size = getattr(pl_module, "input_size", None)
        if (
            not trainer.is_global_zero
            or not isinstance(trainer.logger, TensorBoardLogger)
            or size is None
            or trainer.ckpt_path
        ):
            return
        network = pl_module.get_submodule("network")
        modes = {module: module.training for module in network.modules()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes are constants in a picture of one size
            trainer.logger.experiment.add_graph(network.eval(), torch.zeros(1, 3, *size, device=pl_module.device))
        for module, training in modes.items():
            module.training = training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's figures."""
        metrics = trainer.callback_metrics  # computed together by all ranks
        parts = [f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"]
        for split, loss in (("train", "train/loss_epoch"), ("val", "val/loss")):
            if loss in metrics:
                parts.append(f"{split} loss {metrics[loss]:.3f} acc {metrics[f'{split}/acc']:6.2%}")
        parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2g}")
        if self._began:
            parts.append(f"{time.monotonic() - self._began:.1f} s")
        say(trainer, "   ".join(parts))


def say(trainer: Trainer, line: str) -> None:
    """Print a line on the first rank, above the progress bar if there is one."""
    if trainer.is_global_zero:
        tqdm.write(line, file=sys.stdout)  # any bar steps aside
        sys.stdout.flush()


def log_final(trainer: Trainer, hparams: dict[str, Any], figures: dict[str, float]) -> None:
    """Write the hyper-parameters with the run's final figures, so that TensorBoard compares runs by them.

    Args:
        trainer: Of the finished run.
        hparams: Options; whatever is not a number, a string or a flag is written as its text.
        figures: Say `{"best/val_acc": 0.9, "best/test_acc": 0.89}`.
    """
    if isinstance(trainer.logger, TensorBoardLogger):
        trainer.logger.log_hyperparams(hparams, figures)
        trainer.logger.save()


def trim_events(run: Path, epoch: int, step: int) -> None:
    """Remove from a run's event files what was logged after its last checkpoint, and will be logged again.

    A killed run has logged more than it has saved; resumed, its curves would overlap.

    Args:
        run: Folder of the run.
        epoch: First epoch that will be run again; figures of epochs have it as their step.
        step: First optimizer step that will be run again.
    """
    for path in sorted(run.glob("events.out.tfevents.*")):
        partial = path.with_name(f"partial.{path.name.replace('tfevents', 'trimmed')}")
        with partial.open("wb") as file:
            writer = RecordWriter(file)
            for event in LegacyEventFileLoader(str(path)).Load():  # stops before a record that was cut short
                tags = {value.tag for value in event.summary.value}
                final = any(tag.startswith("best/") for tag in tags)
                if not tags or (not final and event.step < (epoch if tags & EPOCH_TAGS else step)):
                    writer.write(event.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
