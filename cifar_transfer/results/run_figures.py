"""Figures of a run, by the names of their files, from what its folder keeps.

metrics.csv                  -> epochs, iterations, stages
figures/predictions-test.npz -> test-confusion, test-classes, test-reliability, test-mistakes, ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from cifar_transfer.data.geometry import pixels
from cifar_transfer.results import plots
from cifar_transfer.results.plots import Curve, Phases, RunCurves
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.results.words import class_name, word


def curve_figures(curves: RunCurves, val_name: str = "validation") -> dict[str, Figure]:
    """Draw the curves of a run: "epochs", "stages" and "iterations", as far as they were logged.

    Args:
        curves: The curves so far.
        val_name: "test" if the run validates on the test images.
    """
    figures = {}
    phases = frozen_phases(curves)
    if curves.learning_rate is not None:
        figures["epochs"] = plots.curves_by_epoch(curves, phases, val_name)
    if curves.stage_rates:
        rates = np.stack(list(curves.stage_rates.values()))
        figures["stages"] = plots.rates_by_stage(rates, list(curves.stage_rates))
    if curves.step_loss is not None:
        phases_in_steps = Phases(phases.first, _steps_after(curves.steps, phases.beginnings))
        figures["iterations"] = plots.curves_by_step(curves, phases_in_steps, val_name)
    return figures


def frozen_phases(curves: RunCurves) -> Phases:
    """Return what was frozen at first, and after which epochs more began to train.

    If nothing was ever unfrozen, the first phase is the whole run.
    """
    parameters = curves.trainable_parameters
    if parameters is None:
        return Phases("backbone frozen", [])
    increases = np.diff(parameters.y) > 0
    begins = (np.flatnonzero(increases) + 1).tolist()
    first_rates = np.array([rates[0] for rates in curves.stage_rates.values()])
    if not begins and first_rates.any() and not first_rates.all():
        begins = [len(parameters.y)]
    backbone_rates = first_rates[:-1]  # the head is the last stage
    if backbone_rates.any():
        return Phases("partly frozen", begins)
    return Phases("backbone frozen", begins)


def _steps_after(steps: Curve | None, epochs: Sequence[float]) -> list[float]:
    """Return how many steps the run had made by the end of each of these epochs, counted from 1."""
    if steps is None:
        return []
    rows = np.array(epochs, np.int64) - 1
    return steps.y[rows].tolist()


def prediction_figures(predictions: Predictions, split: str) -> dict[str, Figure]:
    """Draw the predictions for a split, "val" or "test": "test-confusion", "test-classes", ..."""
    names = [class_name(name) for name in predictions.names]
    predictions = replace(predictions, names=names)
    figures = {
        f"{split}-confusion": plots.confusion(predictions, split),
        f"{split}-classes": plots.per_class(predictions),
        f"{split}-reliability": plots.reliability(predictions),
    }
    correct = predictions.correct[predictions.rows]
    for name, heading, selected in (
        ("mistakes", "The most confident mistakes", ~correct),
        ("correct", "Correct", correct),
    ):
        if selected.any():
            figures[f"{split}-{name}"] = _image_grid(predictions, selected, word(heading))
    return figures


def _image_grid(predictions: Predictions, selected: Tensor, heading: str) -> Figure:
    """Draw some of the images that are kept; `selected` is bool [K]."""
    images = predictions.images[selected].numpy()
    titles = [_image_title(predictions, row) for row in predictions.rows[selected].tolist()]
    return plots.grid(images, titles, heading)


def _image_title(predictions: Predictions, row: int) -> list[str]:
    """Return the class of an image, or of a mistake both classes and the confidence."""
    label = int(predictions.labels[row])
    predicted = int(predictions.predicted[row])
    if label == predicted:
        return [predictions.names[label]]
    return [
        word("is {name}", name=predictions.names[label]),
        word("said {name}", name=predictions.names[predicted]),
        word("{share:.1%} sure", share=float(predictions.confidences[row])),
    ]


def augmented_figure(images: np.ndarray, shares: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw augmented training images.

    Args:
        images: uint8 [N, 3, H, W], RGB.
        shares: Share of each class in the label of each image, float [N, C].
        class_names: Names of the C classes.
    """
    titles = [_title_of_shares(row, class_names) for row in shares]
    heading = word(
        "Training images as the network sees them, {size} pixels", size=pixels(images.shape[2:])
    )
    return plots.grid(images, titles, heading)


def _title_of_shares(shares: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Return the classes that are in an image, the largest first, with their shares of several."""
    classes = np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)]
    if len(classes) == 1:
        return [class_name(class_names[classes[0]])]
    lines = []
    for number in classes:
        lines.append(f"{class_name(class_names[number])} {shares[number]:.0%}")
    return lines


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as a PNG file of its name, into a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        plots.save(figure, path)
        paths.append(path)
    return paths
