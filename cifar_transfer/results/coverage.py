"""What is won by not answering: accuracy beside the share of images that is answered.

An image is answered if the probability of its likeliest class reaches a threshold, as in
`predict --threshold`. The curve over all thresholds is the risk-coverage curve (El-Yaniv and Wiener
2010, https://jmlr.org/papers/v11/el-yaniv10a.html), with accuracy in the place of risk.
"""

from typing import NamedTuple

import torch

from cifar_transfer.results.predictions import Predictions

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # that tables and figures name


class CoverageCurve(NamedTuple):
    """Accuracy by the share that is answered, one point for each confidence that occurs.

    Attributes:
        shares: Shares of the images that are answered, float64 [K], rising to 1.
        accuracies: Accuracies of these answers, float64 [K] in [0, 1].
    """

    shares: torch.Tensor
    accuracies: torch.Tensor


def coverage_curve(predictions: Predictions) -> CoverageCurve:
    """Return accuracy by the share that is answered, from the surest predictions to all of them."""
    order = predictions.confidences.argsort(descending=True, stable=True)
    confidences = predictions.confidences[order]
    hits = predictions.correct[order].double().cumsum(0)
    counts = torch.arange(1, len(order) + 1, dtype=torch.float64)
    # A threshold answers all images of one confidence, or none of them.
    is_last_of_its_confidence = torch.ones(len(order), dtype=torch.bool)
    is_last_of_its_confidence[:-1] = confidences.diff() != 0
    shares = counts / len(order)
    accuracies = hits / counts
    return CoverageCurve(shares[is_last_of_its_confidence], accuracies[is_last_of_its_confidence])


def answered(predictions: Predictions, threshold: float) -> tuple[float, float | None]:
    """Return the share of the images that is answered at a threshold, and the accuracy of that.

    The accuracy is None if no image is answered.
    """
    is_answered = predictions.confidences >= threshold
    share = float(is_answered.double().mean())
    if share == 0:
        return 0.0, None
    return share, float(predictions.correct[is_answered].double().mean())
