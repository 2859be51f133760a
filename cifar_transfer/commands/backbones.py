"""List the backbones.

    python -m cifar_transfer backbones [PATTERN|--detail NAME]

Without a pattern, torchvision's networks and LeNet-5 are listed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import markdown, program
from cifar_transfer.cli.parsers import PartParser
from cifar_transfer.network import catalog
from cifar_transfer.network.summary import (
    BackboneDetails,
    BackboneSummary,
    inspect_backbone,
    summarise,
)

HEADINGS = [
    "name",
    "params (M)",
    "top-1 err",
    "top-5 err",
    "native",
    "weights",
    "licence or source",
]


def main(args: Sequence[str]) -> None:
    """Parse the options and print."""
    options = make_parser().parse_args(args)
    if options.detail:
        print(details_text(inspect_backbone(options.detail, options.image_size)))
        return
    names = catalog.names(options.pattern)
    if not names:
        raise UserError(
            f"No backbone is named like {options.pattern!r}; timm's are listed with 'timm/*'."
        )
    summaries = [summarise(name) for name in names]
    if options.json:
        print(json.dumps([asdict(summary) for summary in summaries], indent=1))
        return
    print(markdown([HEADINGS, *map(table_row, summaries)]), end="")
    if not catalog.is_timm(options.pattern):
        print(f"\ntimm's networks: {program('backbones')} 'timm/*' (needs timm)")


def make_parser() -> PartParser:
    """Return the parser of this command's options."""
    parser = PartParser("backbones")
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="Part of a name, or a pattern with * and ?. "
        "timm's networks are listed with 'timm/*' and the like.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument(
        "--detail",
        metavar="NAME",
        help="Of one network: stem, head, what is frozen, what small_images changes.",
    )
    parser.add_argument(
        "--image_size", type=int, help="For --detail: side of the images in pixels (32)."
    )
    return parser


def table_row(summary: BackboneSummary) -> list[str]:
    """Return the cells of a network in the order of `HEADINGS`. Unknown figures are left blank."""
    return [
        summary.name,
        _number(summary.parameters, unit=1e6),
        _number(summary.top1_error),
        _number(summary.top5_error),
        str(summary.native or ""),
        ", ".join(summary.weights) or "none",
        (summary.licence_or_source or "").removeprefix("https://"),
    ]


def _number(value: float | None, unit: float = 1) -> str:
    """Return a number in a unit with two decimals, "" for None."""
    return "" if value is None else f"{value / unit:.2f}"


def details_text(details: BackboneDetails) -> str:
    """Return what is known of a network, one thing a line."""
    frozen = f"{details.frozen_parameters:,} of {details.parameters:,} parameters"
    lines = [f"{details.name} at {details.side} pixels", f"  stem    {details.stem}"]
    for head in details.heads:
        lines.append(f"  head    {head}")
    lines.append(f"  stages  {', '.join(details.stages)}")
    lines.append(f"  frozen  {frozen} while only the head trains")
    for entry in details.weights:
        origin = entry.licence or entry.source
        lines.append(f"  weights {entry.name} ({entry.native_side} pixels; {origin})")
    lines.append(f"  small_images=true, at {details.small_side} pixels")
    for change in details.small_changes or ["changes nothing"]:
        lines.append(f"    {change}")
    return "\n".join(lines)
