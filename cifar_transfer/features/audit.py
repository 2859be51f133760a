"""All findings in the images of a data module, by the features of a backbone."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from cifar_transfer.base.text import markdown, printable
from cifar_transfer.data.loading import rows_loader
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.data.splits import Split
from cifar_transfer.features import findings
from cifar_transfer.features.extract import Features
from cifar_transfer.features.findings import Finding
from cifar_transfer.features.near_duplicates import near_duplicates

LABELS = "labels"
DUPLICATES = "duplicates"
OUTLIERS = "outliers"
BLANK = "blank"
FINDINGS = (LABELS, DUPLICATES, OUTLIERS, BLANK)  # in the order in which they are listed
BATCH_IMAGES = 256
THUMBNAIL_SIDE = 96  # pixels of the longer side
MAX_CLASS_PAIRS = 10  # in the summary


class AuditedImages:
    """All images of a data module as one sequence of N rows, the training images first.

    Attributes:
        splits: Splits in the order of their images. Test images that are also the validation images
            (`val_fraction=0`) are left out, because each would be its own duplicate.
        names: Names as in a record of splits, "train/cat/007.png".
        labels: int64 [N].
        class_names: Names of the classes.
    """

    def __init__(self, data: ImageDataModule) -> None:
        self.data = data
        self.splits = list(data.images)
        if data.names["val"] == data.names.get("test"):
            self.splits.remove("test")
        self.names: list[str] = []
        labels = []
        for split in self.splits:
            self.names += data.names_of_images(split)
            labels.append(data.images[split].labels)
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.class_names = data.class_names
        lengths = [len(data.images[split]) for split in self.splits]
        self._ends = np.cumsum(lengths)

    def batches(self) -> Iterator[Tensor]:
        """Yield all images in batches, uint8 [B, 3, H, W]."""
        for split in self.splits:
            shard = self.data.shard(split)
            count = len(shard.images)
            batches = []
            for start in range(0, count, BATCH_IMAGES):
                batches.append(range(start, min(start + BATCH_IMAGES, count)))
            for images, _ in rows_loader(shard.images, batches, shard.workers):
                yield images

    def split_of(self, row: int) -> int:
        """Return the position of a row's split in `splits`."""
        return int(np.searchsorted(self._ends, row, "right"))

    def class_name(self, row: int) -> str:
        """Return the name of a row's label."""
        return self.class_names[int(self.labels[row])]

    def thumbnail(self, row: int) -> str:
        """Return an image as a PNG in base64."""
        position = self.split_of(row)
        images = self.data.images[self.splits[position]]
        first = self._ends[position] - len(images)
        pixels = images.pixels(np.array([row - first]))[0]
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def likeness(self, kind: str, finding: Finding) -> str:
        """Return the likelier class, the other image, or nothing, by the kind of finding."""
        if finding.like is None:
            return ""
        if kind == LABELS:
            return self.class_names[finding.like]
        return self.names[finding.like]


def find_all(images: AuditedImages, features: Mapping[Split, Features]) -> dict[str, list[Finding]]:
    """Return all findings by their kind, one of `FINDINGS`; each list has the surest first."""
    features = {split: features[split] for split in images.splits}
    rank_zero_info("Judging labels by cross-validation ...")
    probabilities = findings.out_of_sample_probabilities(features, len(images.class_names))
    accuracy = float((probabilities.argmax(1) == images.labels).float().mean())
    rank_zero_info(f"cross-validated accuracy  {accuracy:.1%}")
    rank_zero_info("Looking for each image's nearest ones ...")
    neighbours = findings.nearest_images(features)
    rank_zero_info("Comparing pixels ...")
    compared = findings.compared_images(images.batches())
    return {
        LABELS: findings.wrong_labels(probabilities, images.labels),
        DUPLICATES: near_duplicates(neighbours, compared.grey),
        OUTLIERS: findings.outliers(neighbours),
        BLANK: findings.blank_images(compared.deviations),
    }


def summary(images: AuditedImages, results: Mapping[str, Sequence[Finding]]) -> str:
    """Return a table of the findings in each split, and the classes most often taken for others."""
    lines = [["finding", *images.splits, "file"]]
    for kind, kind_findings in results.items():
        counts = [0] * len(images.splits)
        for finding in kind_findings:
            counts[images.split_of(finding.row)] += 1
        lines.append([kind, *map(str, counts), f"{kind}.csv"])
    pairs = _frequent_class_pairs(images, results[LABELS])
    return f"{markdown(lines)}\nLabels that may be wrong, most often: {pairs}."


def _frequent_class_pairs(images: AuditedImages, label_findings: Sequence[Finding]) -> str:
    """Return the most frequent pairs of a label and the likelier class, with their counts."""
    counts: dict[str, int] = {}
    for finding in label_findings:
        label = printable(images.class_name(finding.row))
        likelier = printable(images.likeness(LABELS, finding))
        pair = f"{label}, perhaps {likelier}"
        counts[pair] = counts.get(pair, 0) + 1
    if not counts:
        return "none"
    most_frequent = sorted(counts.items(), key=lambda item: -item[1])[:MAX_CLASS_PAIRS]
    return "; ".join(f"{pair}: {count}" for pair, count in most_frequent)
