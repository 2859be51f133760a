"""Figures of a run: drawn from its files, kept in its folder and in TensorBoard.

events.out.tfevents.* -> curves        figures/predictions-test.npz -> confusion, reliability, mistakes, ...
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.data.geometry import pixels, resize
from cifar_transfer.data.module import ImageDataModule, step_seed
from cifar_transfer.files import atomic_write
from cifar_transfer.results import plots
from cifar_transfer.results.predictions import CollectPredictions, Predictions

FOLDER = "figures"  # in that of the run
AUGMENTED = 32  # images shown of the training's


def curves(run: Path) -> dict[str, Figure]:
    """Loss by step, and loss and accuracy by epoch, from the run's event files and its configuration."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        found[tag] = plots.Curve(*np.array(points, np.float64).T)
    if "lr" in found and found["lr"].x[0] == 0:  # of version 0.1.0, which counted epochs from 0
        epochs = {tag: plots.Curve(found[tag].x + 1, found[tag].y) for tag in plots.BY_EPOCH if tag in found}
        found |= epochs
    drawn = {}
    if "train/loss" in found:
        drawn["loss"] = plots.loss_by_step(found["train/loss"])
    if "lr" in found:
        freeze = yaml.safe_load((run / "config.yaml").read_text())["freeze"]
        frozen = min(freeze["unfreeze_epoch"], len(found["lr"].x))
        drawn["epochs"] = plots.epochs(found, frozen, found["lr"])
    return drawn


def prediction_plots(predictions: Predictions, split: str) -> dict[str, Figure]:
    """Plots of the predictions of a split, by name."""
    rows = predictions.rows
    images = predictions.images.numpy()
    names, labels, predicted = predictions.names, predictions.labels[rows], predictions.predicted[rows]
    sure = predictions.confidences[rows]
    right = predictions.correct[rows].numpy()
    titles = [
        (names[truth],) if truth == guess else (f"is {names[truth]}", f"said {names[guess]}", f"{share:.1%} sure")
        for truth, guess, share in zip(labels.tolist(), predicted.tolist(), sure.tolist(), strict=True)
    ]
    drawn = {
        "confusion": plots.confusion(predictions),
        "classes": plots.per_class(predictions),
        "reliability": plots.reliability(predictions),
    }
    for name, heading, chosen in (("mistakes", "The most confident mistakes", ~right), ("correct", "Correct", right)):
        if chosen.any():
            places = np.flatnonzero(chosen)
            drawn[name] = plots.grid(images[places], [titles[place] for place in places], heading)
    return {f"{split}-{name}": figure for name, figure in drawn.items()}


def augmented(data: ImageDataModule, size: int | None) -> Figure:
    """Training images as the network will see them, but for the normalisation; no draw of the training is disturbed.

    Args:
        data: After `setup`.
        size: Side in pixels to which the network will resize them, or None.
    """
    images = data.images["train"]
    rows = np.linspace(0, len(images) - 1, min(AUGMENTED, len(images))).astype(int)
    batch, labels = images.__getitems__(rows.tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(data.seed, 0, 0, 0))
        seen = data.augment(batch)
    seen = resize(seen, size)
    shown = (255 * seen.clamp(0, 1)).round().byte().numpy()
    titles = [(data.class_names[label],) for label in labels.tolist()]
    return plots.grid(shown, titles, f"Training images as the network sees them, {pixels(shown.shape[2:])} pixels")


def save(drawn: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each as a PNG of its name, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        with atomic_write(paths[-1]) as file:
            figure.savefig(file, dpi=plots.DPI, format="png")
    return paths


def publish(run: Path, split: str, collected: CollectPredictions, board: SummaryWriter | None, step: int) -> None:
    """Keep the predictions of a split in the run's folder and draw them, there and in TensorBoard.

    Args:
        run: Folder of the run.
        split: Of the images that were evaluated.
        collected: The predictions, and perhaps features for the projector.
        board: Writer into the run's folder, or None.
        step: To which they belong.
    """
    if collected.predictions is None:  # another rank's business
        return
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    kept = run / FOLDER / f"predictions-{split}.npz"
    collected.predictions.save(kept)
    # Drawn from the file, so that drawing it again later gives the same pixels.
    paths = save(prediction_plots(Predictions.load(kept), split), run / FOLDER)
    if board is None:
        return
    show(paths, board, step)
    if collected.features is not None and collected.classes is not None and collected.thumbnails is not None:
        names = [collected.predictions.names[label] for label in collected.classes.tolist()]
        board.add_embedding(collected.features, names, collected.thumbnails / 255, step, tag=f"{split} features")


def show(paths: Sequence[Path], board: SummaryWriter, step: int) -> None:
    """Put pictures into TensorBoard's Images."""
    for path in paths:
        with Image.open(path) as picture:
            board.add_image(f"figures/{path.stem}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
