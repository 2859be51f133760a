"""A backbone with its weights, as commands take it: NAME or NAME=WEIGHTS."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import user_path
from cifar_transfer.network import catalog
from cifar_transfer.network.weights import are_none


@dataclass(frozen=True)
class Contestant:
    """A backbone with its weights.

    Attributes:
        name: Name of the backbone.
        label: Name and weights, for tables and figures.
        folder: The label, fit for a folder's name.
        scratch: Whether the backbone starts without pretrained weights.
        options: Options of `fit` that choose backbone and weights.
    """

    name: str
    label: str
    folder: str
    scratch: bool
    options: list[str]


def parse_contestants(texts: Sequence[str]) -> list[Contestant]:
    """Return the contestants of several texts.

    Raises:
        UserError: See `parse_contestant`, or two of them have one name, and so one folder.
    """
    contestants = [parse_contestant(text) for text in texts]
    folders = {contestant.folder for contestant in contestants}
    if len(folders) < len(contestants):
        raise UserError(
            "Two of the backbones have one name, and so one folder: "
            "name each once, or rename its weights."
        )
    return contestants


def parse_contestant(text: str) -> Contestant:
    """Return the contestant of a text, NAME or NAME=WEIGHTS.

    Args:
        text: WEIGHTS is a name that the library has for its weights, a file, or "none". Without it,
            the weights are the default.

    Raises:
        UserError: There is no such backbone, or no such file or weights.
    """
    name, _, weights = text.partition("=")
    catalog.check(name)
    options = [f"--model.backbone={name}"]
    scratch = are_none(weights)
    if scratch:
        kind = "from scratch"
        options.append(f"--model.weights={weights}")
        # There is nothing worth freezing.
        options += ["--freeze.unfreeze_epoch=0", "--freeze.phases=null", "--freeze.probe=false"]
    elif weights:
        weights = _resolve_weights(text, name, weights)
        kind = _name_of_weights(weights).removeprefix(name).strip("-_.") or "pretrained"
        options.append(f"--model.weights={weights}")
    else:
        kind = "pretrained"
    label = f"{name}, {kind}"
    folder = re.sub(r"[^\w.]+", "-", label)
    return Contestant(name, label, folder, scratch, options)


def _resolve_weights(text: str, name: str, weights: str) -> str:
    """Return the library's name of weights as it is, and a file as an absolute path.

    Raises:
        UserError: The weights are neither.
    """
    if weights in ("DEFAULT", *catalog.weights(name)):
        return weights
    path = user_path(weights)
    if not path.is_file():
        raise UserError(
            f"{text}: {weights} is neither a file nor a name of {name}'s weights, nor none."
        )
    return str(path.resolve())


def _name_of_weights(weights: str) -> str:
    """Return a short name for weights, with the run's folder because all runs name files alike."""
    path = Path(weights)
    if path.parent.name != "checkpoints":
        return path.stem
    run_folder = path.parts[-3:-2]
    return "-".join((*run_folder, path.stem))
