"""How much of what is known to be wrong `audit` finds: `python -m benchmarks.audit NAME[=WEIGHTS]`.

All further options are those of `audit`. One label in twenty is changed, and the order in which
they are listed is scored. Copies of training images, changed as people change them, are put among
the test images, and those that are listed beside their original are counted.
"""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from cifar_transfer.base.text import markdown
from cifar_transfer.cli.features_cli import Extraction, extract, parser
from cifar_transfer.data.geometry import to_float
from cifar_transfer.data.splits import Split
from cifar_transfer.features import findings
from cifar_transfer.features.audit import AuditedImages
from cifar_transfer.features.extract import Features
from cifar_transfer.features.near_duplicates import near_duplicates
from cifar_transfer.network.contestant import parse_contestant

CHANGED_SHARE = 0.05  # of the labels
COPIES = 20  # of each kind
BATCH_IMAGES = 128
JPEG_QUALITY = 50

Picture = Image.Image
Change = Callable[[Picture, np.random.Generator], Picture]


def compressed(image: Picture, generator: np.random.Generator) -> Picture:
    """Return an image that was a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return Image.open(file).convert("RGB")


def shifted(image: Picture, generator: np.random.Generator) -> Picture:
    """Return an image shifted by a tenth of its sides at most, with black edges."""
    right, down = generator.uniform(-0.1, 0.1, 2) * image.size
    return image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, round(right), 0, 1, round(down))
    )


def mirrored_shifted_compressed(image: Picture, generator: np.random.Generator) -> Picture:
    """Return an image with three changes."""
    return compressed(shifted(ImageOps.mirror(image), generator), generator)


def brighter_or_darker(image: Picture, generator: np.random.Generator) -> Picture:
    """Return an image of another brightness."""
    return ImageEnhance.Brightness(image).enhance(generator.choice([0.7, 1.3]))


def other_contrast(image: Picture, generator: np.random.Generator) -> Picture:
    """Return an image of another contrast."""
    return ImageEnhance.Contrast(image).enhance(generator.choice([0.6, 1.4]))


def turned(image: Picture, generator: np.random.Generator) -> Picture:
    """Return an image turned by 5 degrees, with black corners."""
    return image.rotate(generator.choice([-5, 5]), Image.Resampling.BILINEAR)


def cut(image: Picture, generator: np.random.Generator) -> Picture:
    """Return the inner 7/8 of an image, enlarged to its size."""
    width, height = image.size
    inner = (width // 16, height // 16, width - width // 16, height - height // 16)
    return image.crop(inner).resize(image.size, Image.Resampling.BILINEAR)


CHANGES: dict[str, Change] = {
    "shifted": shifted,
    "mirrored": lambda image, generator: ImageOps.mirror(image),
    "brighter or darker": brighter_or_darker,
    "more or less contrast": other_contrast,
    f"JPEG of quality {JPEG_QUALITY}": compressed,
    "without colours": lambda image, generator: image.convert("L").convert("RGB"),
    "mirrored, shifted, JPEG": mirrored_shifted_compressed,
    "turned by 5 degrees": turned,
    "cut to 28 of 32 pixels": cut,
    "upside down": lambda image, generator: ImageOps.flip(image),
}


def average_precision(scores: Tensor, wrong: Tensor) -> float:
    """Return the mean of the precision down to each wrong label, in the order of scores.

    Args:
        scores: The surer the higher, float [N].
        wrong: Whether a label is wrong, bool [N].
    """
    sorted_wrong = wrong[scores.argsort(descending=True, stable=True)].double()
    precision = sorted_wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)
    return float((precision * sorted_wrong).sum() / sorted_wrong.sum())


def score_labels(features: dict[Split, Features], num_classes: int) -> list[list[str]]:
    """Return a table of how well changed labels are listed."""
    generator = np.random.default_rng(0)
    changed_features: dict[Split, Features] = {}
    changed_labels = []
    changed = []
    for split, split_features in features.items():
        labels = split_features.labels
        is_changed = generator.random(len(labels)) < CHANGED_SHARE
        others = (labels + generator.integers(1, num_classes, len(labels))) % num_classes
        new_labels = np.where(is_changed, others, labels)
        changed_features[split] = Features(split_features.views, new_labels)
        changed_labels.append(torch.from_numpy(new_labels))
        changed.append(torch.from_numpy(is_changed))
    wrong = torch.cat(changed)
    all_labels = torch.cat(changed_labels)
    probabilities = findings.out_of_sample_probabilities(changed_features, num_classes)
    scores = 1 - probabilities.gather(1, all_labels[:, None])[:, 0]
    rows = [finding.row for finding in findings.wrong_labels(probabilities, all_labels)]
    num_wrong = int(wrong.sum())
    return [
        ["changed", "average precision", "listed", "precision of as many", "recall of all"],
        [
            f"{num_wrong:,}",
            f"{average_precision(scores, wrong):.2f}",
            f"{len(rows):,}",
            f"{float(wrong[rows[:num_wrong]].float().mean()):.0%}",
            f"{int(wrong[rows].sum()) / num_wrong:.0%}",
        ],
    ]


def score_duplicates(extraction: Extraction) -> list[list[str]]:
    """Return a table of how many planted copies are listed beside their original."""
    images = AuditedImages(extraction.data)
    generator = np.random.default_rng(0)
    train = extraction.data.images["train"]
    originals = generator.permutation(len(train))[: COPIES * len(CHANGES)]
    copies = []
    kinds = []
    for number, row in enumerate(originals):
        kind = list(CHANGES)[number % len(CHANGES)]
        pixels = train.pixels(np.array([row]))[0]
        picture = CHANGES[kind](Image.fromarray(pixels.transpose(1, 2, 0)), generator)
        copies.append(torch.from_numpy(np.array(picture).transpose(2, 0, 1)))
        kinds.append(kind)
    planted = torch.stack(copies)
    features: dict[Split, Features] = {split: extraction.features[split] for split in images.splits}
    last = images.splits[-1]
    values = [features[last].views[0][:], _features(extraction, planted)]
    labels = [features[last].labels, np.zeros(len(planted), np.int64)]
    features[last] = Features([np.concatenate(values)], np.concatenate(labels))
    compared = findings.compared_images([*images.batches(), planted])
    duplicates = near_duplicates(findings.nearest_images(features), compared.grey)
    count = len(images.names)
    found = dict.fromkeys(CHANGES, 0)
    others = 0
    for finding in duplicates:
        if finding.row < count:
            others += 1
        elif finding.like == originals[finding.row - count]:
            found[kinds[finding.row - count]] += 1
    table = [["copies", "planted", "found"]]
    for kind, number in found.items():
        table.append([kind, str(kinds.count(kind)), str(number)])
    return [*table, ["listed, but not planted", "", f"{others:,}"]]


def _features(extraction: Extraction, images: Tensor) -> np.ndarray:
    """Return the features of images, uint8 [B, 3, H, W], as float32 [B, D]."""
    classifier = extraction.model.classifier
    parts = []
    with torch.inference_mode():
        for batch in images.split(BATCH_IMAGES):
            with classifier.features() as passes:
                classifier(to_float(batch.to(classifier.device)))
            parts.append(passes[0])
    return torch.cat(parts).numpy()


def main(args: Sequence[str]) -> None:
    """Compute the features, and print both tables."""
    options_parser = parser("audit", Path("audit-benchmark"))
    options_parser.add_argument("backbone")
    options, fit_options = options_parser.parse_known_args(args)
    extraction = extract(parse_contestant(options.backbone), options, fit_options, options.out)
    print(markdown(score_labels(extraction.features, extraction.data.num_classes)))
    print(markdown(score_duplicates(extraction)))


if __name__ == "__main__":
    main(sys.argv[1:])
