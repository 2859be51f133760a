"""The first second of a command: help, version and misspelt options, before PyTorch is imported.

The options of every command are in `options.json`, which `python tests/test_contract.py` writes
from the live parsers. It serves help and spelling only: the parsers decide what is allowed.
"""

import io
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cifar_transfer import __version__
from cifar_transfer.base.errors import DEBUG, one_sentence
from cifar_transfer.base.text import program
from cifar_transfer.cli import recipes, spelling

COMMANDS = (
    "fit",
    "evaluate",
    "predict",
    "embed",
    "export",
    "compare",
    "probe",
    "audit",
    "backbones",
    "figures",
    "serve",
    "demo",
)
TAKE_OPTIONS_OF_FIT = ("audit", "compare", "demo", "probe")
OPTIONS = Path(__file__).with_name("options.json")
MAX_HELP_COLUMNS = 120
OPTION_COLUMNS = 26  # of the help; what is longer has its description on the next line


def run(command: str, args: Sequence[str] | None = None) -> NoReturn:
    """Import a command, call its `main(args)`, and exit with the status that `main` returns.

    Args:
        command: One of `COMMANDS`.
        args: Its options; None takes the arguments of this process.
    """
    if args is None:
        args = sys.argv[1:]
    args = _without_debug(args)
    with one_sentence():
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
        args = answer(command, args)
        with _quiet_ctrl_c():
            _announce_loading(command)
            main = import_module(f"cifar_transfer.commands.{command}").main
        sys.exit(main(args))


def answer(command: str, args: Sequence[str]) -> list[str]:
    """Print help or version and exit, if the options ask for it.

    Args:
        command: One of `COMMANDS`.
        args: Its options. Those behind "--" are not looked at.

    Returns:
        The options, with the file of each recipe that is given by name.

    Raises:
        UserError: There is no such option or recipe.
    """
    options = args
    if "--" in args:
        options = args[: args.index("--")]
    if "-h" in options or "--help" in options:
        print(help_text(command))
        sys.exit()
    if "--version" in options:
        print(version())
        sys.exit()
    spelling.check_options(options, option_names(command), _read_options()["lightning"])
    return recipes.with_recipe_files(args)


def _without_debug(args: Sequence[str]) -> list[str]:
    """Return options without `--debug`, which has errors shown with their traceback."""
    end = len(args)
    if "--" in args:
        end = list(args).index("--")
    options = [arg for arg in args[:end] if arg != "--debug"]
    if len(options) < end:
        os.environ[DEBUG] = "1"
    return [*options, *args[end:]]


@contextmanager
def _quiet_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once: a module that is being imported may catch exceptions."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _exit_by_sigint)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_by_sigint(signal_number: int, frame: FrameType | None) -> None:
    os._exit(128 + signal.SIGINT)


def _announce_loading(command: str) -> None:
    """Print on stderr that PyTorch is being loaded, which takes seconds. Only rank 0 prints."""
    for rank in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        if os.environ.get(rank, "0") != "0":
            return
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    if command == "fit" or on_terminal:
        print(f"cifar_transfer {__version__}: loading PyTorch ...", file=sys.stderr, flush=True)


def version() -> str:
    """Return the versions of this package and of the libraries that matter most."""
    libraries = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "lightning")
    )
    python = sys.version.split()[0]
    return f"cifar_transfer {__version__} ({libraries}, Python {python})"


def help_text(command: str) -> str:
    """Return what `--help` prints, as wide as the terminal."""
    columns = min(shutil.get_terminal_size().columns, MAX_HELP_COLUMNS)
    about = _read_options()["commands"][command]
    paragraphs = [f"usage: {program(about['usage'])}", f"{about['title']}."]
    for text in about["text"]:
        is_table = "\n" in text
        paragraphs.append(text if is_table else textwrap.fill(text, columns))
    for heading, options in about["groups"].items():
        lines = [textwrap.fill(f"{heading}:", columns)]
        for option, description in options.items():
            lines.append(_option_help(option, description, columns))
        paragraphs.append("\n".join(lines))
    paragraphs.append("With --debug, an error is shown with its traceback.")
    return "\n\n".join(paragraphs)


def _option_help(option: str, description: str, columns: int) -> str:
    line = f"  {option:<{OPTION_COLUMNS}}  {description}"
    if len(option) <= OPTION_COLUMNS and len(line) <= columns:
        return line
    indent = " " * 6
    below = textwrap.fill(description, columns, initial_indent=indent, subsequent_indent=indent)
    return f"  {option}\n{below}"


def list_text() -> str:
    """Return the list of commands, a line for each."""
    commands = _read_options()["commands"]
    lines = ["usage: cifar-transfer COMMAND [options]", ""]
    for name in COMMANDS:
        lines.append(f"  {name:<10}  {commands[name]['title']}")
    lines.append("")
    lines.append(
        "Each takes --help, --version and --debug, which shows an error with its traceback."
    )
    lines.append("Each is python -m cifar_transfer COMMAND too.")
    return "\n".join(lines)


def option_names(command: str) -> list[str]:
    """Return all options of a command, such as "--model.lr", in the order of its help."""
    commands = [command]
    if command in TAKE_OPTIONS_OF_FIT:
        commands.append("fit")
    names = ["--help", "--version", "--debug"]
    for name in commands:
        about = _read_options()["commands"][name]
        for options in about["groups"].values():
            names += [option.partition("=")[0] for option in options]
        names += about["silent"]
    options = dict.fromkeys(names)  # several classes have an option of one name
    return [name for name in options if name.startswith("--")]


def completions(line: str) -> list[str]:
    """Return what the last word of a shell's line, "cifar-transfer fit --model.l", may become."""
    words = line.split(" ")[1:]
    candidates: Sequence[str] = ()
    if len(words) < 2:
        candidates = COMMANDS
    elif words[0] in COMMANDS:
        candidates = option_names(words[0])
    return [word for word in candidates if word.startswith(words[-1])]


def _read_options() -> Any:
    return json.loads(OPTIONS.read_text("utf-8"))
