"""Scores of a split as text for a terminal."""

import numpy as np

from cifar_transfer.base.text import markdown, printable
from cifar_transfer.network.temperature import NO_TEMPERATURE
from cifar_transfer.results.coverage import THRESHOLDS
from cifar_transfer.results.scores import Scores

MAX_CLASSES_SHOWN = 20  # of more, those with the lowest F1


def score_lines(scores: Scores) -> str:
    """Return the scores of all images, one a line."""
    low, high = scores.interval
    without_nll = ""
    without_error = ""
    if scores.temperature != NO_TEMPERATURE:
        with_temperature = f"with temperature {scores.temperature:.2f}"
        without_nll = f" {with_temperature}, {scores.nll_before:.4f} without"
        without_error = f" {with_temperature}, {scores.error_before:.2%} without"
    lines = {
        "accuracy": f"{scores.accuracy:.2%} of {scores.num_images:,} images, {low:.2%} to "
        f"{high:.2%} (95 % interval)",
        "balanced accuracy": f"{scores.classes.balanced_accuracy:.2%}",
    }
    if scores.top5_accuracy is not None:
        lines["top-5 accuracy"] = f"{scores.top5_accuracy:.2%}"
    lines["NLL"] = f"{scores.nll:.4f}{without_nll}"
    lines["calibration error"] = f"{scores.bins.calibration_error:.2%}{without_error}"
    width = max(map(len, lines))
    return "".join(f"{name:<{width}}  {value}\n" for name, value in lines.items())


def bin_table(scores: Scores) -> str:
    """Return a table of the bins of confidence that have images."""
    bins = scores.bins
    num_bins = len(bins.counts)
    rows = [("confidence (%)", "images", "mean confidence (%)", "accuracy (%)")]
    for number in np.flatnonzero(bins.counts):
        rows.append(
            (
                f"{100 * number / num_bins:.1f} to {100 * (number + 1) / num_bins:.1f}",
                str(bins.counts[number]),
                f"{100 * bins.confidences[number]:.1f}",
                f"{100 * bins.accuracies[number]:.1f}",
            )
        )
    return markdown(rows)


def class_table(scores: Scores) -> str:
    """Return a table of the classes; of more than 20, those with the lowest F1, the worst first."""
    classes = scores.classes
    num_classes = len(scores.class_names)
    labels = np.arange(num_classes)
    note = ""
    if num_classes > MAX_CLASSES_SHOWN:
        labels = np.argsort(classes.f1, kind="stable")[:MAX_CLASSES_SHOWN]
        note = f"The {MAX_CLASSES_SHOWN} of {num_classes:,} classes with the lowest F1.\n"
    rows = [("class", "precision (%)", "recall (%)", "F1 (%)", "images")]
    for label in labels:
        rows.append(
            (
                printable(scores.class_names[label]),
                f"{100 * classes.precision[label]:.1f}",
                f"{100 * classes.recall[label]:.1f}",
                f"{100 * classes.f1[label]:.1f}",
                str(classes.support[label]),
            )
        )
    return markdown(rows) + note


def coverage_table(scores: Scores) -> str:
    """Return a table of what is answered at each threshold, and how well."""
    rows = [("threshold", "answered (%)", "accuracy (%)")]
    for threshold, (share, accuracy) in zip(THRESHOLDS, scores.coverage, strict=True):
        accuracy_text = ""
        if accuracy is not None:
            accuracy_text = f"{100 * accuracy:.2f}"
        rows.append((f"{threshold:g}", f"{100 * share:.1f}", accuracy_text))
    return markdown(rows)
