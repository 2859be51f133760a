"""Which backbones there are: `python -m cifar_transfer.backbones [PATTERN] [--json]`, or `--detail NAME` of one."""

import argparse
import json
from typing import Any

import torch
from torch import nn

from cifar_transfer.console import markdown
from cifar_transfer.errors import UserError, first_line, one_sentence
from cifar_transfer.network import build, catalog
from cifar_transfer.network.catalog import LENET, TIMM
from cifar_transfer.network.small_images import ASSUMED

COLUMNS = {
    "name": "name",
    "parameters": "params (M)",
    "gflops": "GFLOPs",
    "top1_error": "top-1 err",
    "top5_error": "top-5 err",
    "native": "native",
    "weights": "weights",
    "licence_or_source": "licence or source",
}


def describe(name: str) -> dict[str, Any]:
    """What its library says of a network; timm says neither parameters nor operations nor errors.

    Args:
        name: Of the network.

    Returns:
        By the keys of `COLUMNS`: parameters as a number, GFLOPs in billions of multiply-adds at the native size, errors
        in per cent on ImageNet-1k's validation set, the native size in pixels; None where unknown.
    """
    published = list(catalog.weights(name).values())
    default = published[0] if published else None
    return {
        "name": name,
        "parameters": default.parameters if default else None,
        "gflops": default.gflops if default else None,
        "top1_error": default.top1 if default else None,
        "top5_error": default.top5 if default else None,
        "native": default.native if default else ASSUMED if name == LENET else None,
        "weights": [entry.name for entry in published],
        "licence_or_source": (default.licence or default.source) if default else None,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    text = {key: "" if row[key] is None else str(row[key]) for key in COLUMNS}
    text["parameters"] = "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}"
    text["gflops"] = "" if row["gflops"] is None else f"{row['gflops']:.{2 if row['gflops'] >= 0.01 else 4}f}"
    for key in ("top1_error", "top5_error"):
        text[key] = "" if row[key] is None else f"{row[key]:.2f}"
    text["weights"] = ", ".join(row["weights"]) or "none"
    text["licence_or_source"] = text["licence_or_source"].removeprefix("https://")
    return list(text.values())


def _layer(network: nn.Module, name: str) -> str:
    return f"{name}: {network.get_submodule(name)}"


def detail(name: str, size: int | None) -> str:
    """Stem, head, what is frozen, and what `small_images` changes.

    Args:
        name: Of the network.
        size: Side of the images in pixels; None for 32, or the least that the network takes if that is more.

    Raises:
        UserError: No such network, or it cannot take the size.
    """
    catalog.check(name)
    stock, adapted = _built(name, size, small=False), _built(name, size, small=True)
    network = stock.network
    stem = next(n for n, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    total = sum(p.numel() for p in network.parameters())
    free = sum(p.numel() for head in stock.heads for p in network.get_submodule(head).parameters())
    return "\n".join(
        [
            f"{name} at {stock.image_size} pixels",
            f"  stem    {stem}: {network.get_submodule(stem)}",
            *(f"  head    {head}: {network.get_submodule(head)}" for head in stock.heads),
            f"  frozen  {total - free:,} of {total:,} parameters while only the head trains",
            *(
                f"  weights {entry.name} ({entry.native} pixels; {entry.licence or entry.source})"
                for entry in catalog.weights(name).values()
            ),
            f"  small_images=true, at {adapted.image_size} pixels",
            *(f"    {change}" for change in adapted.changes or ["changes nothing"]),
        ]
    )


def _built(name: str, size: int | None, small: bool) -> build.Backbone:
    """At the size, or the first that the network takes."""
    least = max([entry.least for entry in catalog.weights(name).values() if entry.least < entry.native] or [1])
    sides = [size] if size else sorted({ASSUMED, max(ASSUMED, least)})
    for side in sides:
        try:
            built = build.build(name, "none", 10, image_size=side, small=small)
            built.network.eval()(torch.zeros(1, 3, side, side))
            return built
        except (UserError, RuntimeError) as error:
            problem = error
    raise (
        problem
        if isinstance(problem, UserError)
        else UserError(f"{name} cannot take images of {sides[-1]} pixels ({first_line(problem)}).")
    )


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_transfer.backbones",
        description="The backbones that --model.backbone takes, in the words of their libraries.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="Part of a name, or a pattern with * and ?. timm's networks are listed with 'timm/*' and the like.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument(
        "--detail", metavar="NAME", help="Of one network: stem, head, what is frozen, what small_images changes."
    )
    parser.add_argument("--image_size", type=int, help="For --detail: side of the images in pixels (32).")
    options = parser.parse_args()
    if options.detail:
        print(detail(options.detail, options.image_size))
        return
    names = catalog.names(options.pattern)
    if not names:
        raise UserError(f"No backbone is named like {options.pattern!r}; timm's are listed with 'timm/*'.")
    rows = [describe(name) for name in names]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(markdown([list(COLUMNS.values()), *map(_cells, rows)]), end="")
    if not options.pattern.startswith(TIMM):
        print("\ntimm's networks: python -m cifar_transfer.backbones 'timm/*' (needs timm)")


if __name__ == "__main__":
    with one_sentence():
        main()
