"""Which backbones there are: `python -m cifar_transfer backbones [PATTERN|--detail NAME]`."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cifar_transfer.base.errors import UserError, first_line
from cifar_transfer.base.text import markdown, program
from cifar_transfer.cli.parsers import PartParser
from cifar_transfer.network import build, catalog
from cifar_transfer.network.catalog import LENET, TIMM
from cifar_transfer.network.small_images import ASSUMED
from cifar_transfer.network.stages import stages

COLUMNS = {
    "name": "name",
    "parameters": "params (M)",
    "top1_error": "top-1 err",
    "top5_error": "top-5 err",
    "native": "native",
    "weights": "weights",
    "licence_or_source": "licence or source",
}


def describe(name: str) -> dict[str, Any]:
    """What its library says of a network, by the keys of `COLUMNS`, None where it does not (timm: but for the last 3).

    Errors are in per cent on ImageNet-1k's validation set, the native size is in pixels.
    """
    published = list(catalog.weights(name).values())
    row = dict.fromkeys(COLUMNS) | {"name": name, "weights": [entry.name for entry in published]}
    if not published:
        return row | {"native": ASSUMED if name == LENET else None}
    default = published[0]
    return row | {
        "parameters": default.parameters,
        "top1_error": default.top1,
        "top5_error": default.top5,
        "native": default.native,
        "licence_or_source": default.licence or default.source,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    cells = {key: "" if row[key] is None else str(row[key]) for key in COLUMNS}
    for key, unit in (("parameters", 1e6), ("top1_error", 1), ("top5_error", 1)):
        if row[key] is not None:
            cells[key] = f"{row[key] / unit:.2f}"
    cells["weights"] = ", ".join(row["weights"]) or "none"
    cells["licence_or_source"] = cells["licence_or_source"].removeprefix("https://")
    return list(cells.values())


def detail(name: str, size: int | None) -> str:
    """Stem, head, what is frozen, and what `small_images` changes.

    Args:
        size: Side of the images in pixels; None for 32, or the least that the network takes if that is more.

    Raises:
        UserError: No such network, or it cannot take the size.
    """
    catalog.check(name)
    stock, adapted = _built(name, size, small=False), _built(name, size, small=True)
    network = stock.network
    stem = next(
        n for n, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    )
    total = sum(p.numel() for p in network.parameters())
    free = sum(p.numel() for head in stock.heads for p in network.get_submodule(head).parameters())
    lines = [
        f"{name} at {stock.image_size} pixels",
        f"  stem    {stem}: {network.get_submodule(stem)}",
        *(f"  head    {head}: {network.get_submodule(head)}" for head in stock.heads),
        f"  stages  {', '.join(stages(network, stock.heads))}",
        f"  frozen  {total - free:,} of {total:,} parameters while only the head trains",
    ]
    for entry in catalog.weights(name).values():
        lines.append(
            f"  weights {entry.name} ({entry.native} pixels; {entry.licence or entry.source})"
        )
    lines.append(f"  small_images=true, at {adapted.image_size} pixels")
    return "\n".join(
        [*lines, *(f"    {change}" for change in adapted.changes or ["changes nothing"])]
    )


def _built(name: str, size: int | None, small: bool) -> build.Backbone:
    """At the size, or the first that the network takes."""
    least = max(
        (entry.least for entry in catalog.weights(name).values() if entry.least < entry.native),
        default=1,
    )
    sides = [size] if size else sorted({ASSUMED, max(ASSUMED, least)})
    for side in sides:
        try:
            built = build.build(name, "none", 10, image_size=side, small=small)
            built.network.eval()(torch.zeros(1, 3, side, side))
            return built
        except UserError as error:
            problem = error
        except RuntimeError as error:
            problem = UserError(
                f"{name} cannot take images of {side} pixels ({first_line(error)})."
            )
    raise problem


def main(args: Sequence[str]) -> None:
    """Parse the options and print."""
    parser = PartParser("backbones")
    listed = "Part of a name, or a pattern with * and ?. timm's networks are listed with 'timm/*' and the like."
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help=listed)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    detailed = "Of one network: stem, head, what is frozen, what small_images changes."
    parser.add_argument("--detail", metavar="NAME", help=detailed)
    parser.add_argument(
        "--image_size", type=int, help="For --detail: side of the images in pixels (32)."
    )
    options = parser.parse_args(args)
    if options.detail:
        print(detail(options.detail, options.image_size))
        return
    names = catalog.names(options.pattern)
    if not names:
        raise UserError(
            f"No backbone is named like {options.pattern!r}; timm's are listed with 'timm/*'."
        )
    rows = [describe(name) for name in names]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(markdown([list(COLUMNS.values()), *map(_cells, rows)]), end="")
    if not options.pattern.startswith(TIMM):
        print(f"\ntimm's networks: {program('backbones')} 'timm/*' (needs timm)")
