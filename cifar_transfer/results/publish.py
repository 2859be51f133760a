"""Figures of a run: drawn from its files, kept in its folder and in TensorBoard.

events.out.tfevents.* -> curves        figures/predictions-test.npz -> confusion, reliability, mistakes, ...
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cifar_transfer.base.files import CONFIG
from cifar_transfer.base.text import printable
from cifar_transfer.data import splits
from cifar_transfer.data.augment import step_seed
from cifar_transfer.data.geometry import pixels, resize
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.results import plots
from cifar_transfer.results.collect import CollectPredictions, squares
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.results.words import class_name, language, language_of, word

FOLDER = "figures"  # in that of the run
PREDICTIONS = "predictions-{}.npz"  # of a split, in there
STEPS = "steps"  # how many the run has made, logged by epoch
STAGES = "stages/"  # before the name of a stage in the tag of its learning rate
FINAL = "result/"  # before that of a score of the best checkpoint
# What has other names in TensorBoard, which sorts by them and opens the first groups.
TAGS = {
    "train/acc": "accuracy/train",
    "train/acc_step": "accuracy/train_step",
    "val/acc": "accuracy/val",
    "val/acc_step": "accuracy/val_step",
    "train/loss_epoch": "loss/train",
    "train/loss": "loss/train_step",
    "val/loss": "loss/val",
    "val/loss_step": "loss/val_step",
}
NAMES = {tag: name for name, tag in TAGS.items()}
AUGMENTED = 32  # images shown of the training's


def curves(run: Path) -> dict[str, Figure]:
    """Loss and accuracy by iteration and by epoch, rates by stage, from the run's event files."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    points: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        points.setdefault(NAMES.get(tag, tag), {}).update(
            (event.step, event.value) for event in events.Scalars(tag)
        )
    # Sorted, because a clock that was set back puts the file of a resumed run before that of its beginning.
    found = {
        name: plots.Curve(*np.array(sorted(values.items()), np.float64).T)
        for name, values in points.items()
    }
    recorded = splits.read(run / CONFIG)
    val = "test" if recorded and recorded["val"][0].startswith("test/") else "validation"
    drawn = {}
    epochs, begins, phases = 1, list[int](), plots.Phases("", ())
    if "lr" in found:
        epochs = len(found["lr"].x)
        if found["lr"].x[0] == 0:  # of version 0.1.0, which counted epochs from 0
            found |= {
                name: plots.Curve(found[name].x + 1, found[name].y)
                for name in plots.BY_EPOCH
                if name in found
            }
        stages = [name for name in found if name.startswith(STAGES)]
        rates = np.array([found[name].y for name in stages])
        begins = (np.flatnonzero(np.diff(found["trainable_parameters"].y) > 0) + 1).tolist()
        if not begins and stages and rates[:, 0].any() and not rates[:, 0].all():
            begins = [epochs]
        partly = len(stages) > 1 and rates[:-1, 0].any()
        phases = plots.Phases("partly frozen" if partly else "backbone frozen", begins)
        drawn["epochs"] = plots.epochs(found, phases, val)
        if stages:
            drawn["stages"] = plots.rates_by_stage(
                rates, [name.removeprefix(STAGES) for name in stages]
            )
    if "train/loss" in found:
        # Older runs do not say how many steps an epoch had.
        steps = (
            found[STEPS].y
            if STEPS in found
            else (np.arange(epochs) + 1) * (found["train/loss"].x[-1] + 1) / epochs
        )
        phases = phases._replace(begins=[float(steps[begin - 1]) for begin in begins])
        drawn["iterations"] = plots.iterations(found, phases, val)
    return drawn


def prediction_plots(predictions: Predictions, split: str) -> dict[str, Figure]:
    """Plots of the predictions of a split, by name."""
    names, rows, images = (
        [class_name(name) for name in predictions.names],
        predictions.rows,
        predictions.images.numpy(),
    )
    predictions = replace(predictions, names=names)
    kept = (
        part[rows].tolist()
        for part in (predictions.labels, predictions.predicted, predictions.confidences)
    )
    titles = [
        (names[truth],)
        if truth == guess
        else [
            word("is {name}", name=names[truth]),
            word("said {name}", name=names[guess]),
            word("{share:.1%} sure", share=share),
        ]
        for truth, guess, share in zip(*kept, strict=True)
    ]
    right = predictions.correct[rows].numpy()
    drawn = {
        "confusion": plots.confusion(predictions, split),
        "classes": plots.per_class(predictions),
    }
    drawn["reliability"] = plots.reliability(predictions)
    for name, heading, chosen in (
        ("mistakes", "The most confident mistakes", ~right),
        ("correct", "Correct", right),
    ):
        if chosen.any():
            drawn[name] = plots.grid(
                images[chosen], [titles[place] for place in np.flatnonzero(chosen)], word(heading)
            )
    return {f"{split}-{name}": figure for name, figure in drawn.items()}


def augmented(data: ImageDataModule, size: int | None) -> Figure:
    """Training images as the network will see them, resized to `size` if not None, but for the normalisation.

    No draw of the training is disturbed.
    """
    images = data.images["train"]
    rows = np.linspace(0, len(images) - 1, min(AUGMENTED, len(images))).astype(int)
    batch, labels = images.__getitems__(rows.tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(data.seed, 0, 0, 0))
        seen = resize(data.augment(batch), size)
    shown = (255 * seen.clamp(0, 1)).round().byte().numpy()
    titles = [(class_name(data.class_names[label]),) for label in labels.tolist()]
    heading = word(
        "Training images as the network sees them, {size} pixels", size=pixels(shown.shape[2:])
    )
    return plots.grid(shown, titles, heading)


def save(
    drawn: dict[str, Figure], folder: Path, board: SummaryWriter | None = None, step: int = 0
) -> list[Path]:
    """Write each as a PNG of its name, each in one move, and put it into TensorBoard's Images."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        plots.save(figure, paths[-1])
        if board is not None:
            with Image.open(paths[-1]) as picture:
                board.add_image(
                    f"plots/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC"
                )
    return paths


def publish(
    run: Path, split: str, collected: CollectPredictions, board: SummaryWriter | None, step: int
) -> None:
    """Keep the predictions of a split in the run's folder and draw them, there and in TensorBoard.

    Args:
        run: Folder of the run.
        split: Of the images that were evaluated.
        collected: The predictions, and perhaps features for the projector.
        board: Writer into the run's folder, or None.
        step: Of the checkpoint.
    """
    if collected.predictions is None:  # another rank's business
        return
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    collected.predictions.save(folder / PREDICTIONS.format(split))
    # Drawn from the file, so that drawing it again later gives the same pixels.
    kept = Predictions.load(folder / PREDICTIONS.format(split))
    with language(language_of(run), kept.names):
        save(prediction_plots(kept, split), folder, board, step)
    if board is not None and collected.features is not None:
        names = [
            printable(collected.predictions.names[label]) for label in collected.classes.tolist()
        ]
        board.add_embedding(
            collected.features, names, squares(collected.thumbnails), step, tag=f"{split} features"
        )
