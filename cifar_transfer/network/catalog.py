"""Which networks and weights there are, in the libraries' own words: names, sizes, statistics, results, licences."""

import difflib
import fnmatch
import importlib
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torchvision import models

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import program

LENET = "lenet5"
TIMM = "timm/"
TORCHVISION: list[str] = models.list_models(module=models)
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Weights:
    """Published weights of a network, and what their library says of them; None where it does not."""

    name: (
        str  # in the library: "IMAGENET1K_V1" in torchvision, a tag such as "augreg_in21k" in timm
    )
    url: str  # of the file; "" if it is on the Hugging Face Hub alone
    hub: tuple[str, str] | None  # repository and file on the Hub
    native: int  # side of the images they were trained or evaluated with, in pixels
    least: int  # side of the smallest images that the network takes, in pixels; 1 where unknown
    mean: Triple  # of the channels in [0, 1], subtracted from them
    std: Triple  # what the channels are divided by
    licence: str  # as stated, or ""
    source: str  # URL of where they come from
    parameters: int | None = None  # of the network with its head
    top1: float | None = None  # error on ImageNet-1k's validation set in per cent
    top5: float | None = None  # the same of the five likeliest classes
    mebibytes: float | None = None  # of the file


def timm() -> ModuleType:
    """The timm package, or a `UserError` that it is not installed."""
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        raise UserError(
            "Networks named timm/... come from the package timm, which is not installed: pip install '.[timm]' in the "
            "project's folder, or pip install timm."
        ) from None


def split(name: str) -> tuple[str, str]:
    """A timm name as architecture and tag: "timm/vit_base_patch16_224.mae" is ("vit_base_patch16_224", "mae")."""
    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    return architecture, tag


def check(name: str) -> None:
    """Refuse a name that no library knows.

    Raises:
        UserError: With the nearest names; or timm is wanted and not installed.
    """
    if name.startswith(TIMM):
        architecture, tag = split(name)
        if not timm().is_model(architecture):
            _unknown(name, [TIMM + known for known in timm().list_models()])
        if tag and tag not in weights(name):
            _unknown(
                name, [f"{TIMM}{architecture}.{known}" for known in weights(TIMM + architecture)]
            )
    elif name not in (LENET, *TORCHVISION):
        _unknown(name, [LENET, *TORCHVISION])


def _unknown(name: str, known: list[str]) -> None:
    near = difflib.get_close_matches(name, known, n=4)
    hint = (
        f"did you mean {', '.join(near)}?" if near else f"take one of {', '.join(known[:4])}, ..."
    )
    raise UserError(f"There is no backbone {name!r}: {hint} All: {program('backbones')}")


def names(pattern: str = "*") -> list[str]:
    """Names that match a pattern with `*` and `?`, or contain it if it has neither; timm's only if it says "timm/".

    Raises:
        UserError: timm's are asked for, and it is not installed.
    """
    known = (
        [TIMM + name for name in timm().list_models()]
        if pattern.startswith(TIMM)
        else [LENET, *TORCHVISION]
    )
    pattern = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return [name for name in known if fnmatch.fnmatchcase(name, pattern)]


def weights(name: str) -> dict[str, Weights]:
    """What is published for a network, by name, the default first; empty if nothing is."""
    if name == LENET:
        return {}
    if name.startswith(TIMM):
        architecture, tag = split(name)
        published = [
            _from_timm(cfg) for cfg in timm().models.get_arch_pretrained_cfgs(architecture).values()
        ]
        known = {entry.name: entry for entry in published if entry.hub or entry.url}
        default = tag or getattr(timm().get_pretrained_cfg(architecture), "tag", None)
    else:
        enum = models.get_model_weights(name)
        known = {entry.name: _from_torchvision(entry) for entry in enum}
        default = enum.DEFAULT.name
    return dict(sorted(known.items(), key=lambda item: item[0] != default))


def _from_torchvision(entry: models.WeightsEnum) -> Weights:
    meta, preset = entry.meta, entry.transforms()
    figures = meta["_metrics"].get("ImageNet-1K", {})
    return Weights(
        name=entry.name,
        url=entry.url,
        hub=None,
        native=preset.crop_size[0],
        least=meta["min_size"][0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        licence=meta.get("license", ""),
        source=meta["recipe"],
        parameters=meta["num_params"],
        top1=_error(figures.get("acc@1")),
        top5=_error(figures.get("acc@5")),
        mebibytes=meta["_file_size"],
    )


def _error(accuracy: float | None) -> float | None:
    return None if accuracy is None or math.isnan(accuracy) else round(100 - accuracy, 3)


def _from_timm(cfg: Any) -> Weights:
    hub = cfg.hf_hub_id
    return Weights(
        name=cfg.tag or "",
        url=cfg.url or "",
        hub=(hub, cfg.hf_hub_filename or "model.safetensors") if hub else None,
        native=cfg.input_size[-1],
        least=cfg.min_input_size[-1] if cfg.min_input_size else 1,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        licence=cfg.license or "",
        source=cfg.origin_url or (f"https://huggingface.co/{hub}" if hub else cfg.url or ""),
    )
