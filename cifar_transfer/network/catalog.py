"""The networks and published weights of torchvision and timm, with what the libraries say."""

import difflib
import fnmatch
import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from torchvision import models

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.text import program

LENET = "lenet5"
TIMM_PREFIX = "timm/"
TORCHVISION_NAMES: list[str] = models.list_models(module=models)
MAX_SUGGESTIONS = 4  # names in a message about an unknown name

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Weights:
    """Published weights of a network, with what their library says of them. None: it does not say.

    Attributes:
        name: Name in the library: "IMAGENET1K_V1" in torchvision, a tag such as "augreg_in21k" in
            timm.
        url: Address of the file, "" if it is only on the Hugging Face Hub.
        hub: Repository and file on the Hub.
        native_side: Side of the images that they were trained or evaluated with, in pixels.
        min_side: Side of the smallest images that the network takes, in pixels, 1 if unknown.
        mean: What was subtracted from the channels R, G, B in [0, 1].
        std: What the channels were divided by.
        licence: Licence as stated, or "".
        source: Address that says where they come from.
        parameters: Number of parameters of the network with its head.
        top1_error: Top-1 error on the validation set of ImageNet-1k, in per cent.
        top5_error: Top-5 error on the same set, in per cent.
        mebibytes: Size of the file.
    """

    name: str
    url: str
    hub: tuple[str, str] | None
    native_side: int
    min_side: int
    mean: Triple
    std: Triple
    licence: str
    source: str
    parameters: int | None = None
    top1_error: float | None = None
    top5_error: float | None = None
    mebibytes: float | None = None


def timm() -> ModuleType:
    """Return the package timm.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        raise UserError(
            "Networks named timm/... come from the package timm, which is not installed: "
            "pip install '.[timm]' in the project's folder, or pip install timm."
        ) from None


def is_timm(name: str) -> bool:
    """Return whether a name is one of timm's."""
    return name.startswith(TIMM_PREFIX)


def split(name: str) -> tuple[str, str]:
    """Return the architecture and the tag of a name.

    "timm/vit_base_patch16_224.mae" becomes ("vit_base_patch16_224", "mae").
    """
    architecture, _, tag = name.removeprefix(TIMM_PREFIX).partition(".")
    return architecture, tag


def check(name: str) -> None:
    """Check that a library has a network of this name.

    Raises:
        UserError: None has; the message suggests names. Or the name is timm's, and timm is not
            installed.
    """
    if not is_timm(name):
        torchvision_and_lenet = [LENET, *TORCHVISION_NAMES]
        if name not in torchvision_and_lenet:
            _raise_unknown(name, torchvision_and_lenet)
        return
    architecture, tag = split(name)
    if not timm().is_model(architecture):
        _raise_unknown(name, _timm_names())
    if tag and tag not in weights(name):
        tags = weights(TIMM_PREFIX + architecture)
        _raise_unknown(name, [f"{TIMM_PREFIX}{architecture}.{other_tag}" for other_tag in tags])


def _timm_names() -> list[str]:
    """Return the names of all networks of timm, with the prefix."""
    return [TIMM_PREFIX + name for name in timm().list_models()]


def _raise_unknown(name: str, candidates: list[str]) -> NoReturn:
    """Raise a `UserError` that suggests the candidates that are spelt most alike."""
    similar_names = difflib.get_close_matches(name, candidates, n=MAX_SUGGESTIONS)
    if similar_names:
        hint = f"did you mean {', '.join(similar_names)}?"
    else:
        hint = f"take one of {', '.join(candidates[:MAX_SUGGESTIONS])}, ..."
    raise UserError(f"There is no backbone {name!r}: {hint} All: {program('backbones')}")


def names(pattern: str = "*") -> list[str]:
    """Return the names that match a pattern with `*` and `?`, or contain it if it has neither.

    The names of timm are searched only if the pattern begins with "timm/".

    Raises:
        UserError: timm's names are asked for, and timm is not installed.
    """
    candidates = _timm_names() if is_timm(pattern) else [LENET, *TORCHVISION_NAMES]
    if not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    return [name for name in candidates if fnmatch.fnmatchcase(name, pattern)]


def weights(name: str) -> dict[str, Weights]:
    """Return the published weights of a network by name, the default first."""
    if name == LENET:
        return {}
    if is_timm(name):
        return _timm_weights(name)
    enum = models.get_model_weights(name)
    entries = [_from_torchvision(member) for member in enum]
    return _default_first(entries, enum.DEFAULT.name)


def default_weights(name: str) -> Weights | None:
    """Return the published weights that "DEFAULT" means, None if there are none."""
    return next(iter(weights(name).values()), None)


def _timm_weights(name: str) -> dict[str, Weights]:
    """Return the weights that timm has for a network, the tagged or default ones first."""
    architecture, tag = split(name)
    entries = []
    for config in timm().models.get_arch_pretrained_cfgs(architecture).values():
        entry = _from_timm(config)
        if entry.hub or entry.url:
            entries.append(entry)
    default_tag = getattr(timm().get_pretrained_cfg(architecture), "tag", None)
    return _default_first(entries, tag or default_tag)


def _default_first(entries: Iterable[Weights], default: str | None) -> dict[str, Weights]:
    """Return weights by name. The default comes first, the others keep their order."""
    entries_by_name = {entry.name: entry for entry in entries}
    order = sorted(entries_by_name, key=lambda name: name != default)
    return {name: entries_by_name[name] for name in order}


def _from_torchvision(member: models.WeightsEnum) -> Weights:
    """Return what torchvision says of weights."""
    meta = member.meta
    preset = member.transforms()
    accuracies = meta["_metrics"].get("ImageNet-1K", {})
    return Weights(
        name=member.name,
        url=member.url,
        hub=None,
        native_side=preset.crop_size[0],
        min_side=meta["min_size"][0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        licence=meta.get("license", ""),
        source=meta["recipe"],
        parameters=meta["num_params"],
        top1_error=_error(accuracies.get("acc@1")),
        top5_error=_error(accuracies.get("acc@5")),
        mebibytes=meta["_file_size"],
    )


def _error(accuracy: float | None) -> float | None:
    """Return the error of an accuracy, both in per cent. None if it is missing or NaN."""
    if accuracy is None or math.isnan(accuracy):
        return None
    return round(100 - accuracy, 3)


def _from_timm(config: Any) -> Weights:
    """Return what timm says of weights in a `PretrainedCfg`."""
    repository = config.hf_hub_id
    url = config.url or ""
    hub = None
    source = config.origin_url or url
    if repository:
        hub = (repository, config.hf_hub_filename or "model.safetensors")
        source = config.origin_url or f"https://huggingface.co/{repository}"
    min_side = 1
    if config.min_input_size:
        min_side = config.min_input_size[-1]
    return Weights(
        name=config.tag or "",
        url=url,
        hub=hub,
        native_side=config.input_size[-1],
        min_side=min_side,
        mean=tuple(config.mean),
        std=tuple(config.std),
        licence=config.license or "",
        source=source,
    )
