"""What users rely on, frozen: the options of each command in `cifar_transfer/cli/options.json`, which is also what
`--help` prints, and public names and keys of files in `contract.json`.

A change here is a decision: `python tests/test_contract.py` writes both anew, and the diff shows what was decided.
"""

import contextlib
import inspect
import io
import json
import os
import re
import tempfile
from collections import defaultdict
from importlib import import_module, metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import RUN, TINY, run_fit

import cifar_transfer
from cifar_transfer.cli import start
from cifar_transfer.training.ema import RAW, STEPS

FILE = Path(__file__).with_name("contract.json")
DATA_MODULES = ("CIFAR10DataModule", "ImageFolderDataModule", "ShapesDataModule")
JOB = [*TINY, "--trainer.max_epochs=1", "--freeze.unfreeze_epoch=0", "--report.figures=true"]
TRAINER = "Lightning's Trainer"
HEADINGS = {  # by how options begin, in the order of the help
    "": "Options, with their defaults (null: none)",
    "--data": "Images, with any --data",
    **{f"{name} --data": f"Images, with --data={name}" for name in DATA_MODULES},
    "--model": "Network and optimizer",
    "--freeze": "What trains when",
    "--report": "What a run shows of itself",
    "--trainer": TRAINER,
}
INSTEAD = {  # of Lightning's words
    "--config": "File of options in YAML, or of fit the name of a recipe. Options behind it override it.",
    "--print_config": "Print all options as they would be, and exit.",
    "--seed_everything": "Seed of all that is drawn: held-out images, their order, augmentation, new weights.",
    "--data": "Where images come from: CIFAR10DataModule, ImageFolderDataModule, ShapesDataModule, or a class.",
    "--trainer.max_epochs": "Epochs; -1 for no end.",
    "--trainer.default_root_dir": "Where lightning_logs/ is; null for the current folder.",
}


def live_help(command, *arguments):
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="10000"),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit, match=r"^0$"),
    ):
        import_module(f"cifar_transfer.commands.{command}").main(arguments or ["--help"])
    return printed.getvalue().partition("\nLinked arguments:")[0]


def entries(text):
    """Each option of a help text: its names, what it takes, and its description."""
    for entry in re.split(r"\n  (?=\S)", text)[1:]:
        first, *rest = entry.split("\n\n")[0].splitlines()
        flags, _, description = first.partition("  ")
        names = [
            name
            for name in re.findall(r"(?<![\w{,.])--?[A-Za-z][\w.]*\+?", flags)
            if not name.endswith("+")
        ]
        takes = re.search(r"(?<=\w )[^ ]*[^ ,]", flags)
        yield names or [flags], takes[0] if takes else "", " ".join([description, *rest]).strip()


def shown(names, takes, text):
    """An option with its default, `--model.lr=0.001`, and its description."""
    kind = r"(.*?)(?: \((required)?(?:,? ?type: .*?)?(?:,? ?default: (.*?))?(?:, known subclasses: .*)?\)\.?)?"
    about, required, default = re.fullmatch(kind, text).groups()
    name = next((name for name in names if name.startswith("--")), names[0])
    if name.startswith("--trainer"):
        sentence = re.split(r"\.(?= )|\.$", about)[0].replace("``", "")
        about = re.sub(r":\w+:`~?([\w.]+\.)*(\w+)`", r"\2", sentence) + "."
    about = INSTEAD.get(name, about[:1].upper() + about[1:])
    choices = re.match(r"\[?\{([^}]*)\}", takes)
    if choices and "true" not in choices[1] and choices[1].split(",")[0] not in about:
        about += f" One of {choices[1].replace(',', ', ')}."
    if default in ("True", "False"):
        default = default.lower()
    if default is None or (default == "null" and "." in takes):
        default = takes
    has_value = default and name.startswith("-") and "[=" not in default
    return f"{name}={default}" if has_value else name, about + " Required." * bool(required)


def commands():
    """What `options.json` holds."""
    found = {}
    for command in start.COMMANDS:
        first, *rest = inspect.getdoc(import_module(f"cifar_transfer.commands.{command}")).split(
            "\n\n"
        )
        title, usage = re.match(r"(.*): `python -m cifar_transfer[. ]([^`]*)`", first).groups()
        text = [part if part.startswith(" ") else " ".join(part.split()) for part in rest]
        groups, silent = defaultdict(dict), []
        helps = {"": "" if command == "demo" else live_help(command)}
        if command == "fit":
            helps |= {f"{name} ": live_help("fit", f"--data.help={name}") for name in DATA_MODULES}
        for of, printed in helps.items():
            for names, takes, about in entries(printed):
                option, about = shown(names, takes, about)
                begins = (
                    of + option.split(".")[0].split("=")[0] if "." in option.split("=")[0] else of
                )
                heading = HEADINGS.get(begins, HEADINGS[""])
                if names[0] in (
                    "--data.seed",
                    "-h",
                ):  # linked to --seed_everything; told of every command
                    continue
                if names[0].endswith(".help") or about == "Path to a configuration file.":
                    silent += names
                else:
                    groups[heading][option] = about
                    silent += [name for name in names if name != option.partition("=")[0]]
        own = [groups[HEADINGS[f"{name} --data"]] for name in DATA_MODULES if command == "fit"]
        for option, about in own[0].copy().items() if own else ():
            if all(group.get(option) == about for group in own):
                groups[HEADINGS["--data"]][option] = about
                for group in own:
                    del group[option]
        order = {
            heading: groups[heading]
            for heading in dict.fromkeys(HEADINGS.values())
            if groups.get(heading)
        }
        found[command] = {
            "title": title,
            "usage": usage,
            "text": text,
            "groups": order,
            "silent": sorted(set(silent)),
        }
    return {"lightning": metadata.version("lightning"), "commands": found}


def contract(run):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    callbacks = {
        re.sub(r"\{.*", "", name): sorted(state) for name, state in checkpoint["callbacks"].items()
    }
    return {
        "public names": sorted(cifar_transfer.__all__),
        "checkpoint": sorted(checkpoint),
        "checkpoint with ema": [RAW, STEPS],
        "checkpoint hyper_parameters": sorted(checkpoint["hyper_parameters"]),
        "checkpoint datamodule_hyper_parameters": sorted(checkpoint["datamodule_hyper_parameters"]),
        "checkpoint callbacks": callbacks,
        "result.json": sorted(json.loads((run / "result.json").read_text())),
        "run": sorted(
            {
                re.sub(r"tfevents.*", "tfevents", str(path.relative_to(run)))
                for path in run.rglob("*")
            }
        ),
    }


def test_nothing_that_users_rely_on_has_changed(run):
    assert contract(run / RUN) == json.loads(FILE.read_text())


def test_the_help_is_that_of_the_parsers():
    written, live = json.loads(start.OPTIONS.read_text("utf-8")), commands()
    if written["lightning"] != live["lightning"]:  # whose options change from version to version
        for each in (written, live):
            del (
                each["lightning"],
                each["commands"]["fit"]["groups"][TRAINER],
                each["commands"]["fit"]["silent"],
            )
    assert live == written, "python tests/test_contract.py writes it anew"


def test_the_defaults_that_are_told_of_fit_are_those_it_has():
    fit = json.loads(start.OPTIONS.read_text("utf-8"))["commands"]["fit"]
    defaults = dict(
        option.partition("=")[::2] for options in fit["groups"].values() for option in options
    )
    told = re.findall(r"(--[\w.]+)=.*\((\d[\d.e-]*)\)", "\n".join(fit["text"]))
    assert len(told) == 4
    for option, default in told:
        assert float(default) == float(defaults[option]), option


if __name__ == "__main__":
    start.OPTIONS.write_text(json.dumps(commands(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    with tempfile.TemporaryDirectory() as folder:
        run_fit(folder, *JOB)
        FILE.write_text(json.dumps(contract(Path(folder, RUN)), indent=1) + "\n")
