"""A backbone with its weights, as a command line names it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cifar_transfer.base.errors import UserError
from cifar_transfer.network import catalog


class Contestant(NamedTuple):
    """A backbone with its weights."""

    name: str
    label: str  # for people
    folder: str  # for the file system
    scratch: bool  # whether it starts without pretraining
    options: list[str]  # for `fit`


def contestants(texts: Sequence[str]) -> list[Contestant]:
    """As `contestant`, for each; a `UserError` refuses two of one name, which would share a folder."""
    found = [contestant(text) for text in texts]
    if len({one.folder for one in found}) < len(found):
        raise UserError(
            "Two of the backbones have one name, and so one folder: name each once, or rename its weights."
        )
    return found


def contestant(text: str) -> Contestant:
    """NAME or NAME=WEIGHTS.

    Raises:
        UserError: There is no such backbone, or no such file or weights.
    """
    name, _, weights = text.partition("=")
    catalog.check(name)
    scratch = weights.lower() == "none"
    if weights and not scratch and weights not in ("DEFAULT", *catalog.weights(name)):
        if not Path(weights).expanduser().is_file():
            raise UserError(
                f"{text}: {weights} is neither a file nor a name of {name}'s weights, nor none."
            )
        weights = str(Path(weights).expanduser().resolve())
    stem = Path(weights).stem
    if (
        Path(weights).parent.name == "checkpoints"
    ):  # of a run, in whose folder all have the same names
        stem = "-".join((*Path(weights).parts[-3:-2], stem))
    kind = "from scratch" if scratch else stem.removeprefix(name).strip("-_.") or "pretrained"
    label = f"{name}, {kind}"
    options = [f"--model.backbone={name}"]
    if weights:
        options.append(f"--model.weights={weights}")
    if scratch:
        # There is nothing worth freezing.
        options += ["--freeze.unfreeze_epoch=0", "--freeze.phases=null", "--freeze.probe=false"]
    return Contestant(name, label, re.sub(r"[^\w.]+", "-", label), scratch, options)
