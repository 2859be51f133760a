"""Figures of a run: drawn from its files, kept in its folder and in TensorBoard.

events.out.tfevents.* -> curves        figures/answers-test.npz -> confusion, reliability, mistakes, ...
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.data.module import ImageDataModule, step_seed
from cifar_transfer.files import atomic_write
from cifar_transfer.results import plots
from cifar_transfer.results.predictions import Answers, CollectAnswers

FOLDER = "figures"  # in that of the run
KEPT = "answers-"  # files of answers begin with it, and end with the split
AUGMENTED = 32  # images shown of the training's
DPI = 100


def curves(run: Path) -> dict[str, Figure]:
    """Loss by step, and loss and accuracy by epoch, from the run's event files and its configuration."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        found[tag] = plots.Curve(*np.array(points, np.float64).T)
    figures = {}
    if "train/loss" in found:
        figures["loss"] = plots.loss_by_step(found["train/loss"])
    if "lr" in found:
        freeze = yaml.safe_load((run / "config.yaml").read_text())["freeze"]
        frozen = min(freeze["unfreeze_epoch"], len(found["lr"].x))
        figures["epochs"] = plots.epochs(found, frozen, found["lr"])
    return figures


def answers(given: Answers, split: str) -> dict[str, Figure]:
    """What the answers to a split look like."""
    images = given.images.numpy()
    names, labels, said = given.names, given.labels[given.rows], given.predictions[given.rows]
    sure = given.confidences[given.rows]
    right = given.correct[given.rows].numpy()
    titles = [
        (names[truth],) if truth == answer else (f"is {names[truth]}", f"said {names[answer]}", f"{share:.1%} sure")
        for truth, answer, share in zip(labels.tolist(), said.tolist(), sure.tolist(), strict=True)
    ]
    figures = {
        "confusion": plots.confusion(given),
        "classes": plots.per_class(given),
        "reliability": plots.reliability(given),
    }
    for name, heading, chosen in (("mistakes", "The most confident mistakes", ~right), ("correct", "Correct", right)):
        if chosen.any():
            rows = np.flatnonzero(chosen)
            figures[name] = plots.grid(images[rows], [titles[row] for row in rows], heading)
    return {f"{split}-{name}": figure for name, figure in figures.items()}


def augmented(data: ImageDataModule, size: int | None) -> Figure:
    """Training images as the network will see them, but for the normalisation; no draw of the training is disturbed.

    Args:
        data: After `setup`.
        size: Side in pixels to which the network will resize them, or None.
    """
    images = data.images["train"]
    rows = np.linspace(0, len(images) - 1, min(AUGMENTED, len(images))).astype(int)
    pixels, labels = images.__getitems__(rows.tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(data.seed, 0, 0, 0))
        seen = data.augment(pixels)
    if size:
        seen = F.interpolate(seen, size=(size, size), mode="bilinear", antialias=True)
    shown = (255 * seen.clamp(0, 1)).round().byte().numpy()
    titles = [(data.class_names[label],) for label in labels.tolist()]
    height, width = shown.shape[2:]
    return plots.grid(shown, titles, f"Training images as the network sees them, {width} x {height} pixels")


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each as a PNG of its name, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with atomic_write(paths[-1]) as file:
            figure.savefig(file, dpi=DPI, format="png")
    return paths


def publish(run: Path, split: str, collected: CollectAnswers, board: SummaryWriter | None, step: int) -> None:
    """Keep the answers to a split in the run's folder and draw them, there and in TensorBoard.

    Args:
        run: Folder of the run.
        split: Of the images that were evaluated.
        collected: The answers, and perhaps features for the projector.
        board: Writer into the run's folder, or None.
        step: To which they belong.
    """
    given = collected.answers
    if given is None:  # another rank's business
        return
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    kept = run / FOLDER / f"{KEPT}{split}.npz"
    given.save(kept)
    paths = save(answers(Answers.load(kept), split), run / FOLDER)  # to the last pixel what is drawn again later
    if board is None:
        return
    show(paths, board, step)
    if collected.features is not None and collected.classes is not None and collected.thumbnails is not None:
        names = [given.names[label] for label in collected.classes.tolist()]
        board.add_embedding(collected.features, names, collected.thumbnails / 255, step, tag=f"{split} features")


def show(paths: Sequence[Path], board: SummaryWriter, step: int) -> None:
    """Put pictures into TensorBoard's Images."""
    for path in paths:
        with Image.open(path) as picture:
            board.add_image(f"figures/{path.stem}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
