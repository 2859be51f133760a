"""Figures of a run, in its folder: `python -m cifar_transfer.figures RUN` draws them again.

events.out.tfevents.* -> curves        figures/answers-test.npz -> confusion, reliability, mistakes, ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer import draw
from cifar_transfer.answers import Answers, CollectAnswers
from cifar_transfer.data import ImageDataModule, step_seed
from cifar_transfer.errors import UserError, first_line, one_sentence
from cifar_transfer.files import whole

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
        found[tag] = draw.Curve(*np.array(points, np.float64).T)
    figures = {}
    if "train/loss" in found:
        figures["loss"] = draw.loss_by_step(found["train/loss"])
    if "lr" in found:
        freeze = yaml.safe_load((run / "config.yaml").read_text())["freeze"]
        frozen = min(freeze["unfreeze_epoch"], len(found["lr"].x))
        figures["epochs"] = draw.epochs(found, frozen, found["lr"])
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
        "confusion": draw.confusion(given),
        "classes": draw.per_class(given),
        "reliability": draw.reliability(given),
    }
    for name, heading, chosen in (("mistakes", "The most confident mistakes", ~right), ("correct", "Correct", right)):
        if chosen.any():
            rows = np.flatnonzero(chosen)
            figures[name] = draw.grid(images[rows], [titles[row] for row in rows], heading)
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
    return draw.grid(shown, titles, f"Training images as the network sees them, {width} x {height} pixels")


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each as a PNG of its name, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with whole(paths[-1]) as file:
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


def figures(run: str) -> list[Path]:
    """Draw a run's figures again from what it has written: curves so far, and answers to the images it was tested on.

    Args:
        run: Folder of the run.

    Returns:
        The pictures, in its folder `figures`.

    Raises:
        UserError: It is no run's folder.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"There is no {folder / 'config.yaml'}: name a run's folder, say lightning_logs/version_0.")
    try:
        paths = save(curves(folder), folder / FOLDER)
        for kept in sorted((folder / FOLDER).glob(f"{KEPT}*.npz")):
            paths += save(answers(Answers.load(kept), kept.stem.removeprefix(KEPT)), folder / FOLDER)
    except (OSError, ValueError, KeyError, TypeError, BadZipFile, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be drawn, for a file of it is damaged ({first_line(error)}).") from None
    print("\n".join(map(str, paths)))
    return paths


if __name__ == "__main__":
    with one_sentence():
        auto_cli(figures, args=sys.argv[1:])
