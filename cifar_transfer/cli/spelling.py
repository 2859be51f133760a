"""Misspelt names of options: which ones certainly do not exist, and what they may mean."""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from importlib import metadata

from cifar_transfer.base.errors import UserError

MAX_HINTS = 3  # names in a message
# Options that are meant where a group of options is given a value.
MEANT_BY_GROUP = {
    "--freeze": "--freeze.unfreeze_epoch",
    "--model": "--model.backbone",
    "--report": "--report.figures",
    "--trainer": "--trainer.accelerator",
}
# The value of this group may be the name of a preset, which only the parser knows.
GROUP_WITH_PRESETS = "--data.augment"
MIN_LIKENESS = 0.6  # of a name in a message, from 0 to 1
MAX_BEHIND_THE_BEST = 0.1  # by which a name in a message may be less like than the likeliest
SYNONYMS = {
    "amp": "precision",
    "arch": "backbone",
    "architecture": "backbone",
    "bf16": "precision",
    "bs": "batch_size",
    "checkpoint": "resume",
    "continue": "resume",
    "data_dir": "root",
    "dataset": "data",
    "epochs": "max_epochs",
    "fp16": "precision",
    "freeze": "unfreeze_epoch",
    "gpus": "devices",
    "half": "precision",
    "learning_rate": "lr",
    "log_dir": "default_root_dir",
    "logdir": "default_root_dir",
    "model": "backbone",
    "net": "backbone",
    "network": "backbone",
    "out": "default_root_dir",
    "output": "default_root_dir",
    "output_dir": "default_root_dir",
    "pretrained": "weights",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
    "save_dir": "default_root_dir",
    "scheduler": "schedule",
    "seed": "seed_everything",
    "size": "image_size",
    "wd": "weight_decay",
    "workers": "num_workers",
}


def check_options(args: Sequence[str], names: Collection[str], lightning: str) -> None:
    """Refuse an option that does not exist, and a value where only a file of options can stand.

    Options of a class that may not be one of this package's are left to the parser.

    Args:
        args: Options of a command line.
        names: All options that are listed for the command.
        lightning: Version of Lightning whose Trainer has the listed options.

    Raises:
        UserError: There is no such option, or it takes no such value.
    """
    for index, arg in enumerate(args):
        name = arg.partition("=")[0].removesuffix("+")
        if not name.startswith("--"):
            continue
        if name in names:
            _check_value(name, _value(args, index), names)
            continue
        group = _closest_parent(name, names)
        if group == "--data":
            complete = _has_listed_data_module(args)
        elif group == "--trainer":
            complete = metadata.version("lightning") == lightning
        else:
            takes_a_class = f"{group}.help" in names
            complete = not takes_a_class
        if complete and _members(name, names):
            raise group_given_a_value(name, _value(args, index) or "given", names)
        if complete:
            raise unknown_option(name, names)


def _value(args: Sequence[str], index: int) -> str | None:
    """Return the value of the option at an index, behind "=" or as the next argument, or None."""
    _, equals, value = args[index].partition("=")
    if equals:
        return value
    if index + 1 < len(args) and not args[index + 1].startswith("--"):
        return args[index + 1]
    return None


def _check_value(name: str, value: str | None, names: Collection[str]) -> None:
    """Refuse a value of a group of options, and a folder in the place of a data module.

    Values that may be a file of options, or such options themselves, are left to the parser.
    """
    if value is None or os.path.isfile(value) or set(value) & set("{:"):
        return
    if name == GROUP_WITH_PRESETS:
        return
    if name == "--data" and os.path.isdir(value):
        raise UserError(
            f"--data takes a data module, and {value} is a folder: give "
            f"--data=ImageFolderDataModule --data.root={value}"
        )
    takes_a_class = f"{name}.help" in names
    if not takes_a_class and _members(name, names):
        raise group_given_a_value(name, value, names)


def _members(name: str, names: Iterable[str]) -> list[str]:
    """Return the options of a group, such as "--model.lr" for "--model"."""
    return [candidate for candidate in names if candidate.startswith(f"{name}.")]


def group_given_a_value(name: str, value: str, names: Iterable[str]) -> UserError:
    """Return the error for a value in the place of a group of options, such as "--model"."""
    problem = f"{name} is a group of options, and not one that can be {value}"
    if name in MEANT_BY_GROUP:
        return UserError(
            f"{problem}: did you mean {MEANT_BY_GROUP[name]}={value}? All options: --help"
        )
    members = ", ".join(_members(name, names)[:MAX_HINTS])
    return UserError(f"{problem}: give its options, {members}, ... All options: --help")


def _closest_parent(name: str, names: Collection[str]) -> str:
    """Return the closest parent that is listed: "--data" for "--data.augment.flp"; or ""."""
    parent = name.rpartition(".")[0]
    while parent and parent not in names:
        parent = parent.rpartition(".")[0]
    return parent


def _has_listed_data_module(args: Sequence[str]) -> bool:
    """Return whether the data module is certainly one of this package.

    A file of options or a dotted path may name another one.
    """
    value_follows = False
    for arg in args:
        if value_follows and not _is_own_class(arg):
            return False
        if arg.startswith(("--config", "-c", "--resume")):
            return False
        if arg.startswith("--data=") and not _is_own_class(arg.removeprefix("--data=")):
            return False
        value_follows = arg == "--data"
    return True


def _is_own_class(name: str) -> bool:
    return re.fullmatch(r"(cifar_transfer\.)?\w+", name) is not None


def unknown_option(name: str, names: Iterable[str]) -> UserError:
    """Return the error for an option that does not exist, with the names that may be meant."""
    hints = similar(name, names)
    if not hints:
        return UserError(f"There is no option {name}. All options: --help")
    return UserError(
        f"There is no option {name}: did you mean {' or '.join(hints)}? All options: --help"
    )


def no_option(argument: str) -> UserError:
    """Return the error for an argument that is neither an option nor the value of one."""
    if os.path.isdir(argument):
        return UserError(
            f"{argument} is no option: for images of your own in that folder, give "
            f"--data=ImageFolderDataModule --data.root={argument}"
        )
    return UserError(f"{argument} is no option: options begin with two dashes. All: --help")


def similar(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three names that a misspelt one may mean, the likeliest first.

    Names are compared as a whole and by their last part: `--epochs` is similar to
    `--trainer.max_epochs`.
    """
    likeness = {candidate: _likeness(name, candidate) for candidate in names}
    ranked = sorted(likeness, key=lambda candidate: -likeness[candidate])[:MAX_HINTS]
    if not ranked:
        return []
    least = max(MIN_LIKENESS, likeness[ranked[0]] - MAX_BEHIND_THE_BEST)
    return [candidate for candidate in ranked if likeness[candidate] >= least]


def _likeness(name: str, candidate: str) -> float:
    """Return how similar a misspelt name is to an existing one, from 0 to 1."""
    name = name.lstrip("-").replace("-", "_")
    candidate = candidate.lstrip("-")
    last_part = name.rpartition(".")[2]
    last_part = SYNONYMS.get(last_part, last_part)
    last_part_of_candidate = candidate.rpartition(".")[2]
    return max(
        difflib.SequenceMatcher(None, name, candidate).ratio(),
        difflib.SequenceMatcher(None, last_part, last_part_of_candidate).ratio(),
    )
