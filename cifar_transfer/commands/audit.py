"""What is probably wrong with images: `python -m cifar_transfer audit NAME[=WEIGHTS] [options of fit]`.

From the features of a backbone, which `probe` shares: `labels.csv`, images whose label is probably wrong, by
cross-validation; `duplicates.csv`, images that are nearly another one, in the same split or across splits;
`outliers.csv`, those least like any other; `blank.csv`, those of nothing. Each has the columns image, label, finding,
score and like (the likelier class, or the other image), the surest first, and `audit.html` shows them. Nothing is
deleted: `fit --data.leave_out=FILE` and `evaluate --leave_out=FILE` do without the images of such a file.

All other options are those of fit, say `--data.root=photos --model.image_size=128`.
"""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import LOGS, write_csv, write_text
from cifar_transfer.base.text import markdown, printable, program
from cifar_transfer.cli.features_cli import features_of, parser
from cifar_transfer.data import splits
from cifar_transfer.data.loading import rows_loader
from cifar_transfer.data.module import ImageDataModule
from cifar_transfer.features import findings
from cifar_transfer.features.findings import Finding
from cifar_transfer.network.contestant import parse_contestant

OUT = Path(LOGS, "audit")
BATCH = 256  # images looked at at once
SHOWN, THUMBNAIL = 500, 96  # of each finding on the page, and pixels of the longest side
COLUMNS = ["image", "label", "finding", "score", "like"]  # of a CSV
PAIRS = 10  # classes most often taken for others
ABOUT = {
    "labels": "Probably of another class than their label says.",
    "duplicates": "Nearly the same as an earlier image, beside it.",
    "outliers": "Least like any other image.",
    "blank": "Of nothing: all pixels are nearly the same.",
}
STYLE = """body{font:14px system-ui,sans-serif;margin:2em;background:#fff;color:#222}
main{display:flex;flex-wrap:wrap;gap:14px}figure{margin:0;max-width:210px;overflow-wrap:anywhere}
img{height:96px;image-rendering:pixelated;margin-right:4px}figcaption{font-size:12px}small{color:#666}
@media(prefers-color-scheme:dark){body{background:#1b1b1b;color:#ddd}small{color:#aaa}}"""


class Audited:
    """All images of a data module in one row, as `findings` counts them.

    Attributes:
        names: As in a record of splits, "train/cat/007.png".
        labels: int64 [N].
    """

    def __init__(self, data: ImageDataModule) -> None:
        self.data = data
        out = splits.read_image_list(data.leave_out) if data.leave_out else frozenset[str]()
        self.names = [
            data.names[split][row]
            for split in data.images
            for row in splits.unlisted_rows(data.names[split], out)
        ]
        self.labels = torch.from_numpy(
            np.concatenate([images.labels for images in data.images.values()])
        )

    def batches(self) -> Iterator[Tensor]:
        """All images, uint8 [B, 3, H, W]."""
        for split in self.data.images:
            shard = self.data.shard(split)
            images = shard.images
            batches = [
                range(first, min(first + BATCH, len(images)))
                for first in range(0, len(images), BATCH)
            ]
            yield from (batch for batch, _ in rows_loader(images, batches, shard.workers))

    def thumbnail(self, row: int) -> str:
        """An image as a PNG, base64."""
        for images in self.data.images.values():
            if row < len(images):
                break
            row -= len(images)
        picture = Image.fromarray(images.pixels(np.array([row]))[0].transpose(1, 2, 0))
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def like(self, finding: str, like: int) -> str:
        """What a finding says of an image: the likelier class, the other image, or nothing."""
        return (
            {"labels": self.data.class_names, "duplicates": self.names}[finding][like]
            if like >= 0
            else ""
        )


def write(audited: Audited, found: Mapping[str, Sequence[Finding]], out: Path) -> None:
    """Write a CSV for each finding, and `audit.html`, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    page = [f"<!doctype html><meta charset=utf-8><title>audit</title><style>{STYLE}</style>"]
    for name, rows in found.items():
        table = [COLUMNS]
        for row, score, like in rows:
            label = audited.data.class_names[int(audited.labels[row])]
            table.append(
                [audited.names[row], label, name, f"{score:.4f}", audited.like(name, like)]
            )
        write_csv(out / f"{name}.csv", table)
        shown = f"the first {SHOWN:,} of {len(rows):,}" if len(rows) > SHOWN else f"{len(rows):,}"
        page.append(f"<h2>{name}: {shown}</h2><p>{ABOUT[name]}</p><main>")
        page += [_figure(audited, name, each) for each in rows[:SHOWN]]
        page.append("</main>")
    write_text(out / "audit.html", "\n".join(page))


def _figure(audited: Audited, name: str, finding: Finding) -> str:
    rows = [finding.row, finding.like] if name == "duplicates" else [finding.row]
    images = "".join(
        f'<img src="data:image/png;base64,{audited.thumbnail(row)}" alt="">' for row in rows
    )
    label = audited.data.class_names[int(audited.labels[finding.row])]
    like, image, label = (
        html.escape(printable(text))
        for text in (audited.like(name, finding.like), audited.names[finding.row], label)
    )
    said = {"labels": f"{label} &rarr; <b>{like}</b>", "duplicates": f"like {like}"}.get(
        name, label
    )
    return f"<figure>{images}<figcaption>{said}<br><small>{image} {finding.score:.2f}</small></figcaption></figure>"


def audit(
    audited: Audited, extracted: Mapping[splits.Split, findings.Features]
) -> dict[str, list[Finding]]:
    """All that is found in images, by their features: `labels`, `duplicates`, `outliers` and `blank`."""
    rank_zero_info("Judging labels by cross-validation ...")
    shares = findings.probabilities(extracted, audited.data.num_classes)
    agreed = float((shares.argmax(1) == audited.labels).float().mean())
    rank_zero_info(f"cross-validated accuracy  {agreed:.1%}")
    rank_zero_info("Looking for each image's nearest ones ...")
    cosines, rows = findings.nearest(extracted)
    rank_zero_info("Comparing pixels ...")
    small, deviations = (
        torch.cat(parts) for parts in zip(*map(findings.small, audited.batches()), strict=True)
    )
    return {
        "labels": findings.wrong_labels(shares, audited.labels),
        "duplicates": findings.near_duplicates(cosines, rows, small),
        "outliers": findings.outliers(cosines),
        "blank": findings.blank(deviations),
    }


def summary(audited: Audited, found: Mapping[str, Sequence[Finding]]) -> str:
    """How much was found in each split, and which classes are taken for which most often."""
    lines = [["finding", *audited.data.images, "file"]]
    ends = np.cumsum([len(images) for images in audited.data.images.values()])
    for name, rows in found.items():
        where = np.bincount(
            np.searchsorted(ends, [row.row for row in rows], "right"), minlength=len(ends)
        )
        lines.append([name, *map(str, where), f"{name}.csv"])
    names, labels = audited.data.class_names, audited.labels.tolist()
    taken: dict[str, int] = {}
    for row, _, like in found["labels"]:
        pair = f"{printable(names[labels[row]])}, perhaps {printable(names[like])}"
        taken[pair] = taken.get(pair, 0) + 1
    most = sorted(taken.items(), key=lambda pair: -pair[1])[:PAIRS]
    pairs = "; ".join(f"{pair}: {count}" for pair, count in most) or "none"
    return f"{markdown(lines)}\nLabels that may be wrong, most often: {pairs}."


def main(args: Sequence[str]) -> None:
    """Parse the options, look at all images, and write what is found.

    Raises:
        UserError: As `features_of`.
    """
    options = parser("audit", OUT)
    wanted = "A backbone, with a name or a file of weights if not those of its library; a checkpoint will do."
    options.add_argument("backbone", metavar="NAME[=WEIGHTS]", help=wanted)
    given, of_fit = options.parse_known_args(args)
    if there := [path for path in (given.out / f"{name}.csv" for name in ABOUT) if path.exists()]:
        raise UserError(
            f"{there[0]} is there already, and may have been edited: name another folder with --out."
        )
    cli, _, extracted, _ = features_of(parse_contestant(given.backbone), given, of_fit, given.out)
    if not cli.trainer.is_global_zero:
        return
    data = cli.datamodule
    if data.names["val"] == data.names.get(
        "test"
    ):  # as with val_fraction=0: each would be its own duplicate
        del data.images["test"], extracted["test"]
    audited = Audited(data)
    found = audit(audited, extracted)
    write(audited, found, given.out)
    print(f"\n{summary(audited, found)}\nlook at it   {given.out / 'audit.html'}")
    print(
        f"do without   {program('fit')} --data.leave_out=FILE, once you have looked through that file"
    )
