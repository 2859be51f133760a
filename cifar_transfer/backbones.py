"""Which backbones there are: `python -m cifar_transfer.backbones [PATTERN] [--json]`, or `--detail NAME` of one."""

import argparse
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cifar_transfer.console import markdown
from cifar_transfer.errors import UserError, one_sentence
from cifar_transfer.network import build, catalog
from cifar_transfer.network.catalog import LENET, TIMM
from cifar_transfer.network.small_images import ASSUMED

COUNTED_AT_MOST = 60  # of timm's networks, which say neither parameters nor operations: each has to be built
COLUMNS = {
    "name": "name",
    "year": "year",
    "parameters": "params (M)",
    "gflops": "GFLOPs",
    "top1_error": "top-1 err",
    "top5_error": "top-5 err",
    "native": "native",
    "weights": "weights",
    "licence_or_source": "licence or source",
}


def describe(name: str, count: bool = True) -> dict[str, Any]:
    """What the libraries say of a network.

    Args:
        name: Of the network.
        count: Build it on no device to count parameters and multiply-adds, where its library does not say them.

    Returns:
        By the keys of `COLUMNS`: parameters as a number, GFLOPs in billions of multiply-adds at the native size, errors
        in per cent on ImageNet-1k's validation set, the native size in pixels; None where unknown.
    """
    published = list(catalog.weights(name).values())
    default = published[0] if published else None
    native = default.native if default else ASSUMED if name == LENET else None
    parameters, gflops = (default.parameters, default.gflops) if default else (None, None)
    if parameters is None and count:
        parameters, gflops = _count(name, native)
    return {
        "name": name,
        "year": catalog.year(name),
        "parameters": parameters,
        "gflops": gflops,
        "top1_error": default.top1 if default else None,
        "top5_error": default.top5 if default else None,
        "native": native,
        "weights": [entry.name for entry in published],
        "licence_or_source": (default.licence or default.source) if default else None,
    }


def _count(name: str, native: int | None) -> tuple[int, float | None]:
    with torch.device("meta"):
        network = build.stock(name).eval()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        if native is None:
            return parameters, None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            try:
                network(torch.empty(1, 3, native, native))
            except (RuntimeError, NotImplementedError):  # something that cannot run without data
                return parameters, None
    return parameters, round(counter.get_total_flops() / 2e9, 4)


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
    """Stem, head, what is frozen, what `small_images` changes, and memory.

    Args:
        name: Of the network.
        size: Side of the images in pixels; None for 32, or the least that the network takes if that is more.

    Raises:
        UserError: No such network, or it cannot take the size.
    """
    catalog.check(name)
    lines = [name]
    for small in (False, True):
        built, side, needed = _at_first_fitting_size(name, size, small)
        network = built.network
        if not small:
            stem = next(n for n, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
            total = sum(p.numel() for p in network.parameters())
            free = sum(p.numel() for head in built.heads for p in network.get_submodule(head).parameters())
            lines.append(f"  stem    {_layer(network, stem)}")
            lines += [f"  head    {_layer(network, head)}" for head in built.heads]
            lines.append(f"  frozen  {total - free:,} of {total:,} parameters while only the head trains")
            for entry in catalog.weights(name).values():
                lines.append(f"  weights {entry.name} ({entry.native} pixels; {entry.licence or entry.source})")
        else:
            lines += ["  small_images=true", *(f"    {change}" for change in built.changes or ["changes nothing"])]
        lines.append(f"    memory at {side} pixels: {needed}" if small else f"  memory  at {side} pixels: {needed}")
    return "\n".join(lines)


def _at_first_fitting_size(name: str, size: int | None, small: bool) -> tuple[build.Backbone, int, str]:
    least = max([entry.least for entry in catalog.weights(name).values() if entry.least < entry.native] or [1])
    sides = [size] if size else sorted({ASSUMED, max(ASSUMED, least)})
    for side in sides:
        try:
            built = build.build(name, "none", 10, image_size=side, small=small)
            return built, side, memory(built.network, built.heads, side)
        except (UserError, RuntimeError) as error:
            problem = error
    raise UserError(f"{name} cannot take images of {sides[-1]} pixels ({str(problem).splitlines()[0]}).")


def memory(network: nn.Module, heads: tuple[str, ...], size: int) -> str:
    """A sentence on what training needs: the parameters with gradients and Adam's moments, and activations an image.

    Args:
        network: On the CPU.
        heads: Names of what trains while the rest is frozen.
        size: Side of the images in pixels.
    """
    everything = _activations(network, size)
    fixed = 4 * 4 * sum(p.numel() for p in network.parameters())
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for head in heads:
        network.get_submodule(head).requires_grad_(True)
    frozen = _activations(network, size)
    return (
        f"{fixed / 2**20:,.0f} MiB of weights, gradients and Adam's moments (float32); an image at batch 1 adds "
        f"{everything / 2**20:.1f} MiB of activations, {frozen / 2**20:.2g} MiB while frozen"
    )


def _activations(network: nn.Module, size: int) -> int:
    """Bytes kept for the backward pass of one image."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in parameters:
            kept[storage] = tensor  # alive, so that no other takes its place in memory
        return tensor

    # In eval mode, as batch-norm cannot train on one image; it keeps as much.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.eval()(torch.zeros(1, 3, size, size))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_transfer.backbones",
        description="The backbones that --model.backbone takes, in the words of their libraries.",
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
        "--detail", metavar="NAME", help="Of one network: stem, head, what small_images changes, memory."
    )
    parser.add_argument("--image_size", type=int, help="For --detail: side of the images in pixels (32).")
    options = parser.parse_args()
    if options.detail:
        print(detail(options.detail, options.image_size))
        return
    names = catalog.names(options.pattern)
    if not names:
        raise UserError(f"No backbone is named like {options.pattern!r}; timm's are listed with 'timm/*'.")
    count = len([name for name in names if name.startswith(TIMM)]) <= COUNTED_AT_MOST
    bar = tqdm(names, leave=False, disable=not sys.stderr.isatty(), delay=2, unit="network")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about networks that are only counted
        rows = [describe(name, count) for name in bar]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(markdown([list(COLUMNS.values()), *map(_cells, rows)]), end="")
    if not count:
        print(
            f"\nParameters and GFLOPs of timm's networks are counted for {COUNTED_AT_MOST} at once: narrow the pattern."
        )
    if not options.pattern.startswith(TIMM):
        print("\ntimm's networks: python -m cifar_transfer.backbones 'timm/*' (needs timm)")


if __name__ == "__main__":
    with one_sentence():
        main()
