"""What the frozen features of a backbone tell of the classes, for each seed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from cifar_transfer.base.files import write_json
from cifar_transfer.results.intervals import Interval, interval_of, paired_difference

TEST = "test (%)"
VALIDATION = "val (%)"
FEW_SHOT = {  # headings by the number of training images of a class
    "1": "1-shot (%)",
    "5": "5-shot (%)",
    "10": "10-shot (%)",
    "50": "50-shot (%)",
}
ACCURACIES = (
    TEST,
    "balanced (%)",
    VALIDATION,
    "1-nearest (%)",
    "5-nearest (%)",
    "20-nearest (%)",
    "means (%)",
    *FEW_SHOT.values(),
)
OTHER_SEEDS = "other_seeds"  # in a file: results with other seeds than the first one


@dataclass(frozen=True)
class ProbeResult:
    """Scores of all heads on the frozen features of a backbone. Accuracies are shares of 1.

    Attributes:
        label: Name of the backbone and its weights.
        seed: Seed that chose the validation images, and those of few-shot heads.
        val: Accuracy of logistic regression on the validation images.
        test: The same on the test images; None without any.
        balanced_accuracy: Mean of the accuracies on each class of these images.
        nearest_neighbours: Accuracy of a vote, by the number of neighbours that vote.
        nearest_mean: Accuracy of the nearest class mean.
        few_shot: Accuracies of several draws by the number of training images of a class.
        penalty: L2 penalty of the logistic regression.
        width: Number of features.
        images_per_class: Training images of a class, on average.
        precision: Precision in which the features were computed, "32-true" or "bf16-mixed".
        computed: Number of images whose features were not on disk; 0 if an earlier seed had them.
        feature_seconds: Time that the features took.
        head_seconds: Time that the heads took.
    """

    label: str
    seed: int
    val: float
    test: float | None
    balanced_accuracy: float
    nearest_neighbours: dict[str, float]
    nearest_mean: float
    few_shot: dict[str, list[float]]
    penalty: float
    width: int
    images_per_class: int
    precision: str
    computed: int
    feature_seconds: float
    head_seconds: float

    @property
    def accuracies(self) -> dict[str, float | None]:
        """Accuracies in per cent by the headings of `ACCURACIES`, None where there is none."""
        shares: list[float | None] = [
            self.test,
            self.balanced_accuracy,
            self.val,
            self.nearest_neighbours["1"],
            self.nearest_neighbours["5"],
            self.nearest_neighbours["20"],
            self.nearest_mean,
        ]
        for shots in FEW_SHOT:
            shares.append(self.few_shot_mean(shots))
        percentages: dict[str, float | None] = {}
        for heading, share in zip(ACCURACIES, shares, strict=True):
            percentages[heading] = None
            if share is not None:
                percentages[heading] = 100 * share
        return percentages

    def few_shot_mean(self, shots: str) -> float | None:
        """Return the mean over the draws of so many images of a class, None if there are none."""
        draws = self.few_shot.get(shots)
        if draws is None:
            return None
        return fmean(draws)


@dataclass(frozen=True)
class ProbedNetwork:
    """A backbone with the results of one seed or more.

    Attributes:
        results: A result for each seed, that of the checkpoint first.
    """

    results: Sequence[ProbeResult]

    @property
    def first(self) -> ProbeResult:
        """Result of the seed that the checkpoint and the features are of."""
        return self.results[0]

    @property
    def label(self) -> str:
        """Name of the backbone and its weights."""
        return self.first.label

    @property
    def accuracy(self) -> float:
        """Mean accuracy by which backbones are ranked: on the test images if there are any."""
        interval = self.interval(TEST) or self.interval(VALIDATION)
        assert interval is not None
        return interval.mean

    @property
    def head_seconds(self) -> float:
        """Time that the heads of a seed took, on average."""
        return fmean(result.head_seconds for result in self.results)

    def by_seed(self, heading: str) -> dict[int, float]:
        """Return one of the `ACCURACIES` in per cent by seed, without those that have none."""
        percentages = {}
        for result in self.results:
            percentage = result.accuracies[heading]
            if percentage is not None:
                percentages[result.seed] = percentage
        return percentages

    def interval(self, heading: str) -> Interval | None:
        """Return the mean of one of the `ACCURACIES` over the seeds, or None if there is none."""
        return interval_of(list(self.by_seed(heading).values()))

    def difference(self, other: "ProbedNetwork", heading: str) -> Interval | None:
        """Return how much more accurate this network is than another, in points, seed by seed.

        None if no seed has both.
        """
        return paired_difference(self.by_seed(heading), other.by_seed(heading))


def write_network(path: Path, network: ProbedNetwork) -> None:
    """Write the results of a network as JSON: those of the first seed, and a list of the others."""
    content = asdict(network.first)
    content[OTHER_SEEDS] = [asdict(result) for result in network.results[1:]]
    write_json(path, content)


def read_network(path: Path) -> ProbedNetwork:
    """Return the results that `write_network` has written."""
    content = json.loads(path.read_text())
    others = content.pop(OTHER_SEEDS)
    return ProbedNetwork([ProbeResult(**result) for result in [content, *others]])
