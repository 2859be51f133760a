"""A checkpoint gets the temperature that its predictions for the validation images ask for."""

from pathlib import Path

import torch
from lightning import Trainer

from cifar_transfer.network.description import NETWORK_KEY
from cifar_transfer.results.calibration import Calibration, calibrate
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.training.run_checkpoints import AtomicCheckpointIO


def calibrate_checkpoint(
    trainer: Trainer, path: Path, predictions: Predictions | None, are_test_images: bool
) -> Calibration | None:
    """Fit a temperature and write it into a checkpoint; all processes call this together.

    Args:
        trainer: Trainer of the run.
        path: The checkpoint.
        predictions: Its predictions for the validation images; None on other processes than the
            first.
        are_test_images: Whether the validation images are the test images; see `calibrate`.

    Returns:
        What was fitted; None on other processes than the first.

    Raises:
        UserError: The checkpoint cannot be written. The one before is kept.
    """
    calibration = None
    if predictions is not None:
        calibration = calibrate(predictions.logits, predictions.labels, are_test_images)
        write_temperature(path, calibration.temperature)
    trainer.strategy.barrier()  # every process is going to read the checkpoint
    return calibration


def write_temperature(path: Path, temperature: float) -> None:
    """Write a temperature into a checkpoint of this project, in one move; all else stays.

    A process that is killed meanwhile leaves the checkpoint as it was.

    Raises:
        UserError: The checkpoint cannot be written. The one before is kept.
    """
    checkpoint = torch.load(path, "cpu", weights_only=True)
    if checkpoint[NETWORK_KEY]["temperature"] == temperature:
        return
    checkpoint[NETWORK_KEY]["temperature"] = temperature
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
