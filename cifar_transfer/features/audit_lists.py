"""What an audit writes: a CSV for each kind of finding, and a page that shows the images."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_transfer.base.files import write_csv, write_text
from cifar_transfer.base.text import printable
from cifar_transfer.features.audit import (
    BLANK,
    DUPLICATES,
    FINDINGS,
    LABELS,
    OUTLIERS,
    AuditedImages,
)
from cifar_transfer.features.findings import Finding

PAGE = "audit.html"
COLUMNS = ["image", "label", "finding", "score", "like"]  # of a CSV
MAX_FIGURES = 500  # of each kind of finding on the page
DESCRIPTIONS = {
    LABELS: "Probably of another class than their label says.",
    DUPLICATES: "Nearly the same as an earlier image, beside it.",
    OUTLIERS: "Least like any other image.",
    BLANK: "Of nothing: all pixels are nearly the same.",
}
STYLE = """body{font:14px system-ui,sans-serif;margin:2em;background:#fff;color:#222}
main{display:flex;flex-wrap:wrap;gap:14px}figure{margin:0;max-width:210px;overflow-wrap:anywhere}
img{height:96px;image-rendering:pixelated;margin-right:4px}
figcaption{font-size:12px}small{color:#666}
@media(prefers-color-scheme:dark){body{background:#1b1b1b;color:#ddd}small{color:#aaa}}"""


def list_path(folder: Path, kind: str) -> Path:
    """Return the CSV of a kind of finding in a folder."""
    return folder / f"{kind}.csv"


def existing_list(folder: Path) -> Path | None:
    """Return a list that is in a folder already, or None."""
    for kind in FINDINGS:
        path = list_path(folder, kind)
        if path.exists():
            return path
    return None


def write_lists(
    images: AuditedImages, results: Mapping[str, Sequence[Finding]], folder: Path
) -> None:
    """Write a CSV for each kind of finding, and the page, into a folder, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    page = [f"<!doctype html><meta charset=utf-8><title>audit</title><style>{STYLE}</style>"]
    for kind, findings in results.items():
        table = [COLUMNS]
        for finding in findings:
            table.append(_list_cells(images, kind, finding))
        write_csv(list_path(folder, kind), table)
        page.extend(_section(images, kind, findings))
    write_text(folder / PAGE, "\n".join(page))


def _list_cells(images: AuditedImages, kind: str, finding: Finding) -> list[str]:
    """Return the cells of a line of a CSV, in the order of `COLUMNS`."""
    return [
        images.names[finding.row],
        images.class_name(finding.row),
        kind,
        f"{finding.score:.4f}",
        images.likeness(kind, finding),
    ]


def _section(images: AuditedImages, kind: str, findings: Sequence[Finding]) -> list[str]:
    """Return the part of the page about a kind of finding."""
    count = f"{len(findings):,}"
    if len(findings) > MAX_FIGURES:
        count = f"the first {MAX_FIGURES:,} of {len(findings):,}"
    lines = [f"<h2>{kind}: {count}</h2><p>{DESCRIPTIONS[kind]}</p><main>"]
    for finding in findings[:MAX_FIGURES]:
        lines.append(_figure(images, kind, finding))
    lines.append("</main>")
    return lines


def _figure(images: AuditedImages, kind: str, finding: Finding) -> str:
    """Return an image, beside the one that it duplicates, with a caption."""
    pictures = _picture(images, finding.row)
    label = html.escape(printable(images.class_name(finding.row)))
    likeness = html.escape(printable(images.likeness(kind, finding)))
    caption = label
    if kind == LABELS:
        caption = f"{label} &rarr; <b>{likeness}</b>"
    elif kind == DUPLICATES and finding.like is not None:
        pictures += _picture(images, finding.like)
        caption = f"like {likeness}"
    name = html.escape(printable(images.names[finding.row]))
    return (
        f"<figure>{pictures}<figcaption>{caption}<br>"
        f"<small>{name} {finding.score:.2f}</small></figcaption></figure>"
    )


def _picture(images: AuditedImages, row: int) -> str:
    """Return the thumbnail of an image, for a page."""
    return f'<img src="data:image/png;base64,{images.thumbnail(row)}" alt="">'
