"""Parsers of command lines. Their errors are one sentence, without a page of usage before it."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse

from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.parser_messages import plain_message

HELP_HINT = "All options: --help"


def refuse_seed(command: str, fit_options: Sequence[str]) -> None:
    """Refuse the seed among the options of `fit` of a command that sets several itself.

    Raises:
        UserError: It is there.
    """
    for option in fit_options:
        if option.partition("=")[0] == "--seed_everything":
            raise UserError(
                f"{command} sets the seeds itself: --seeds=5 takes 0 to 4; leave --seed_everything "
                f"out."
            )


class Parser(jsonargparse.ArgumentParser):
    """A parser for a command that knows all of its options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` that says what is wrong."""
        required = "the following arguments are required: "
        if message.startswith(required):
            names = [self._as_typed(name) for name in message.removeprefix(required).split(", ")]
            message = required + ", ".join(names)
        raise UserError(f"{plain_message(message)} ({HELP_HINT})")

    def _as_typed(self, name: str) -> str:
        """Return "--ckpt" for "ckpt", if that is an option and not an argument by its place."""
        return f"--{name}" if f"--{name}" in self._option_string_actions else name


class PartParser(argparse.ArgumentParser):
    """A parser for a command that hands the options that it does not know on to `fit`.

    Args:
        command: Name of the command.
    """

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"python -m cifar_transfer {command}", allow_abbrev=False)

    def add_config(self) -> None:
        """Add the option of recipes, which `config_options` hands on to `fit`."""
        self.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="A recipe, as fit takes it.",
        )

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` that says what is wrong."""
        raise UserError(f"{plain_message(message)} ({HELP_HINT})")

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse like argparse, but let the value of an unknown option contain spaces.

        argparse takes "--data.root=my photos" for an argument that is no option.
        """
        hidden_spaces = []
        for arg in args:
            name = arg.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                arg = arg.replace(" ", "\0")
            hidden_spaces.append(arg)
        options, unknown = super().parse_known_args(hidden_spaces, namespace)
        return options, [arg.replace("\0", " ") for arg in unknown]


def config_options(options: argparse.Namespace) -> list[str]:
    """Return the options of `fit` that name the recipes of a command line, in their order."""
    return [f"--config={file}" for file in options.config]
