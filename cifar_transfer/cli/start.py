"""The first second of a command: help, version, misspelt options and recipes by name, before PyTorch is imported.

What it knows of the commands is in `options.json`, which `python tests/test_contract.py` writes from the live parsers.
"""

import difflib
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from cifar_transfer import __version__
from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.base.text import program

COMMANDS = (
    *("fit", "evaluate", "predict", "embed", "export", "compare", "probe", "audit"),
    *("backbones", "figures", "serve", "demo"),
)
TAKE_OPTIONS_OF_FIT = ("audit", "compare", "demo", "probe")
OPTIONS = Path(__file__).with_name("options.json")
_INSTALLED, _CHECKOUT = (folder / "configs" for folder in Path(__file__).parents[1:3])
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
SYNONYMS = {
    **dict.fromkeys(("arch", "architecture", "model", "net", "network"), "backbone"),
    **dict.fromkeys(("checkpoint", "continue", "resume_from", "resume_from_checkpoint"), "resume"),
    **dict.fromkeys(("amp", "bf16", "fp16", "half"), "precision"),
    **dict.fromkeys(
        ("log_dir", "logdir", "out", "output", "output_dir", "save_dir"), "default_root_dir"
    ),
    **{
        "bs": "batch_size",
        "dataset": "data",
        "data_dir": "root",
        "epochs": "max_epochs",
        "freeze": "unfreeze_epoch",
    },
    **{"gpus": "devices", "learning_rate": "lr", "pretrained": "weights", "scheduler": "schedule"},
    **{
        "seed": "seed_everything",
        "size": "image_size",
        "wd": "weight_decay",
        "workers": "num_workers",
    },
}


def run(command: str, args: Sequence[str] | None = None) -> NoReturn:
    """Be the program that a command is: import it, call its `main(args)`, and exit with the status that this returns.

    Args:
        args: Without them, those of this process.
    """
    with one_sentence():
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        given = answer(command, sys.argv[1:] if args is None else args)
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:
            # Nothing has begun, and what is being imported might catch an exception.
            signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
        first = not any(
            os.environ.get(rank, "0") != "0" for rank in ("LOCAL_RANK", "RANK", "SLURM_PROCID")
        )
        if first and (command == "fit" or (sys.stderr and sys.stderr.isatty())):
            print(f"cifar_transfer {__version__}: loading PyTorch ...", file=sys.stderr, flush=True)
        main = import_module(f"cifar_transfer.commands.{command}").main
        signal.signal(signal.SIGINT, before)
        sys.exit(main(given))


def answer(command: str, args: Sequence[str]) -> list[str]:
    """Answer `--help` and `--version`, which ends the program; else the options, recipes in them as files.

    Raises:
        UserError: An option or a recipe that there is not.
    """
    given = args[: args.index("--")] if "--" in args else args
    if not {"-h", "--help"}.isdisjoint(given):
        _show(help_text(command))
        sys.exit()
    if "--version" in given:
        print(version())
        sys.exit()
    known = known_options(command)
    for name in (arg.partition("=")[0].removesuffix("+") for arg in given if arg.startswith("--")):
        if name not in known and _all_known(name, known, " ".join(given)):
            raise unknown(name, known)
    return with_recipes(args)


def _show(text: str) -> None:
    if sys.stdout.isatty() and text.count("\n") > shutil.get_terminal_size().lines:
        from pydoc import pager  # which asks for a third of all the time that help takes

        os.environ.setdefault("LESS", "FRX")  # what was read stays on the terminal
        pager(text)
    else:
        print(text)


def version() -> str:
    """This package's version, and those that matter beside it."""
    others = (f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "lightning"))
    return f"cifar_transfer {__version__} ({', '.join(others)}, Python {sys.version.split()[0]})"


def help_text(command: str) -> str:
    """What `--help` prints, as wide as the terminal."""
    wide = min(shutil.get_terminal_size().columns, 120)
    about = _read()["commands"][command]
    lines = [f"usage: {program(about['usage'])}", f"\n{about['title']}."]
    for paragraph in about["text"]:
        lines.append("\n" + (paragraph if "\n" in paragraph else textwrap.fill(paragraph, wide)))
    for heading, options in about["groups"].items():
        lines += ["\n" + textwrap.fill(f"{heading}:", wide)]
        for option, text in options.items():
            short = f"  {option:<26}  {text}"
            long = textwrap.fill(text, wide, initial_indent=6 * " ", subsequent_indent=6 * " ")
            lines += [short] if len(option) <= 26 and len(short) <= wide else [f"  {option}", long]
    return "\n".join(lines)


def list_text() -> str:
    """The commands with a line each."""
    titles = (f"  {name:<10}  {_read()['commands'][name]['title']}" for name in COMMANDS)
    each = "Each takes --help and --version, and is python -m cifar_transfer COMMAND too."
    return "\n".join(["usage: cifar-transfer COMMAND [options]", "", *titles, "", each])


def known_options(command: str) -> list[str]:
    """All options of a command, `--model.lr`, in the order of its help."""
    found: list[str] = ["--help", "--version"]
    for name in (command, "fit") if command in TAKE_OPTIONS_OF_FIT else (command,):
        about = _read()["commands"][name]
        found += [
            option.partition("=")[0] for options in about["groups"].values() for option in options
        ]
        found += about["silent"]
    return [option for option in found if option.startswith("--")]


def completions(line: str) -> list[str]:
    """What the last word of a line of the shell may become, `cifar-transfer fit --model.l`."""
    _, *words = line.split(" ")
    every = COMMANDS if len(words) < 2 else known_options(words[0]) if words[0] in COMMANDS else []
    return [word for word in every if word.startswith(words[-1])]


def unknown(name: str, known: Iterable[str]) -> UserError:
    """The error of an option that there is not, with those that may be meant."""
    meant = " or ".join(near(name, known))
    return UserError(
        f"There is no option {name}{f': did you mean {meant}?' if meant else '.'} All options: --help"
    )


def near(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known options that a misspelt one may mean, the likeliest first.

    They are compared by all of their name, and by its last part: `--epochs` is near to `--trainer.max_epochs`.
    """
    wanted = name.lstrip("-").replace("-", "_")
    last = wanted.rpartition(".")[2]
    last = SYNONYMS.get(last, last)

    def likeness(option: str) -> float:
        whole = option.lstrip("-")
        pairs = ((wanted, whole), (last, whole.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    ranked = sorted(((likeness(option), option) for option in known), key=lambda pair: -pair[0])
    return [option for share, option in ranked[:3] if share >= max(0.6, ranked[0][0] - 0.1)]


def with_recipes(args: Sequence[str]) -> list[str]:
    """Options whose `--config fast` names the file of that recipe.

    Raises:
        UserError: There is neither such a file nor such a recipe.
    """
    found = []
    for before, arg in pairwise(["", *args]):
        if before in ("--config", "-c"):
            arg = _recipe(arg)
        elif arg.startswith("--config="):
            arg = f"--config={_recipe(arg.partition('=')[2])}"
        found.append(arg)
    return found


def _recipe(name: str) -> str:
    if Path(name).exists() or set(name) & set(
        "{:"
    ):  # or options in YAML, which jsonargparse takes too
        return name
    recipes = {path.stem: str(path) for path in sorted(RECIPES.glob("*.yaml"))}
    if name not in recipes:
        raise UserError(
            f"--config {name} is neither a file nor a recipe: the recipes are {', '.join(recipes)}."
        )
    return recipes[name]


def _all_known(name: str, known: Collection[str], given: str) -> bool:
    """Whether all options beside `name` are known here: not if they are those of a class that others may write."""
    parent = name
    while (parent := parent.rpartition(".")[0]) and parent not in known:
        pass
    if parent == "--data":
        return not re.search(
            r"(^| )(--config|-c|--resume|--data[= ](?!(cifar_transfer\.)?\w+( |$)))", given
        )
    if parent == "--trainer":
        return metadata.version("lightning") == _read()["lightning"]
    return f"{parent}.help" not in known


def _read() -> Any:
    return json.loads(OPTIONS.read_text("utf-8"))
