"""Pictures, a graph and a page of charts: what TensorBoard shows of a run beside its curves."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.base.errors import first_line

# Charts of the tab "Custom scalars": patterns of tags by title.
CHARTS = {
    "Training and validation": {
        "accuracy": ["Multiline", ["^accuracy/train$", "^accuracy/val$"]],
        "loss": ["Multiline", ["^loss/train$", "^loss/val$"]],
    },
    "Schedule": {
        "learning rate": ["Multiline", ["^lr$"]],
        "rate by stage": ["Multiline", ["stages/"]],
        "trainable parameters": ["Multiline", ["trainable_parameters"]],
    },
}


def board_of(trainer: Trainer) -> SummaryWriter | None:
    """Return the writer of a trainer's first logger, or None if that is not TensorBoard's."""
    if isinstance(trainer.logger, TensorBoardLogger):
        return trainer.logger.experiment
    return None


def add_charts(board: SummaryWriter) -> None:
    """Add the page of charts."""
    board.add_custom_scalars(CHARTS)


def add_pictures(board: SummaryWriter, paths: Iterable[Path], step: int) -> None:
    """Add PNG files under the names of the files."""
    for path in paths:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        board.add_image(f"plots/{path.stem}", pixels, step, dataformats="HWC")


def add_graph(board: SummaryWriter, network: nn.Module, example: Tensor) -> str | None:
    """Add the graph of a network, which is left in the modes in which it is.

    Args:
        board: TensorBoard's writer.
        network: The network.
        example: A batch that it takes.

    Returns:
        Why there is no graph, if there is none: a picture must not cost the run.
    """
    modes = {module: module.training for module in network.modules()}
    try:
        with warnings.catch_warnings():
            # Sizes are constants in a graph for one size of images.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            board.add_graph(network.eval(), example)
    except Exception as error:  # of any kind, because the network may be anybody's
        return first_line(error)
    finally:
        for module, training in modes.items():
            module.training = training
    return None
