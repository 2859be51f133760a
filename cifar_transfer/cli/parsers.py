"""Parsers of command lines, whose errors are a sentence without a page of usage before it."""

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from cifar_transfer.base.errors import UserError, account
from cifar_transfer.base.text import without_password

HELP_HINT = "All options: --help"
RECIPE = "recipe.json"  # in a folder of results: the options that they were made with


def check_recipe(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """What goes into a folder's `RECIPE`, the options and what is in their files of options.

    Raises:
        UserError: The folder holds results of another recipe.
    """
    recipe: dict[str, Any] = {"options": [without_password(option) for option in options]}
    for file in (
        Path(option.partition("=")[2]) for option in options if option.startswith("--config=")
    ):
        recipe.setdefault("config", []).extend(
            file.read_text().splitlines() if file.is_file() else []
        )
    with suppress(ValueError):
        if not (folder / RECIPE).is_file() or json.loads((folder / RECIPE).read_text()) == recipe:
            return recipe
    raise UserError(
        f"{folder} holds results of another recipe ({RECIPE}): name another folder with --out."
    )


class _OneSentence:
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` with what is wrong and a hint."""
        raise UserError(f"{account(message)} ({HELP_HINT})")


class Parser(_OneSentence, jsonargparse.ArgumentParser):
    """Of a command whose options are all its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)


class PartParser(_OneSentence, argparse.ArgumentParser):
    """Of a command that hands on the options which it does not know, as jsonargparse's cannot.

    Args:
        command: Its name.
    """

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"python -m cifar_transfer.{command}", allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which would take an unknown option with a space in its value for no option."""
        known = self._option_string_actions
        unknown = [arg.startswith("--") and arg.partition("=")[0] not in known for arg in args]
        hidden = [
            arg.replace(" ", "\0") if other else arg
            for arg, other in zip(args, unknown, strict=True)
        ]
        given, rest = super().parse_known_args(hidden, namespace)
        return given, [arg.replace("\0", " ") for arg in rest]
