"""What users rely on, frozen: options of the commands, public names, files of a run, their keys.

The options are in `cifar_transfer/cli/options.json`, which is also what `--help` prints. The rest
is in `contract.json`. A change of either is a decision: `python tests/test_contract.py` writes both
anew, and the diff shows what was decided.
"""

import contextlib
import inspect
import io
import json
import os
import re
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import RUN, TINY, run_fit

import cifar_transfer
from cifar_transfer.cli import start
from cifar_transfer.training.checkpoint_file import RAW_STATE_KEY, STEPS_KEY

CONTRACT = Path(__file__).with_name("contract.json")
JOB = [*TINY, "--trainer.max_epochs=1", "--freeze.unfreeze_epoch=0", "--report.figures=true"]
DATA_MODULES = (
    "CIFAR10DataModule",
    "ImageFolderDataModule",
    "ShapesDataModule",
    "TableDataModule",
    "TorchvisionDataModule",
)
OPTIONS = "Options, with their defaults (null: none)"
ANY_DATA = "Images, with any --data"
TRAINER = "Lightning's Trainer"
HEADINGS = {  # by the group of an option, in the order of the help
    "": OPTIONS,
    "--data": ANY_DATA,
    **{name: f"Images, with --data={name}" for name in DATA_MODULES},
    "--model": "Network and optimizer",
    "--freeze": "What trains when",
    "--report": "What a run shows of itself",
    "--trainer": TRAINER,
}
NOT_LISTED = ("--data.seed", "-h")  # the first is linked to --seed_everything
OUR_WORDS = {  # in place of Lightning's and jsonargparse's
    "--config": "File of options in YAML, or of fit the name of a recipe. "
    "Options behind it override it.",
    "--print_config": "Print all options as they would be, and exit.",
    "--seed_everything": "Seed of all that is drawn: held-out images, their order, augmentation, "
    "new weights.",
    "--data": "Where images come from: CIFAR10DataModule, ImageFolderDataModule, "
    "ShapesDataModule, TableDataModule, TorchvisionDataModule, or a class.",
    "--trainer.max_epochs": "Epochs; -1 for no end.",
    "--trainer.default_root_dir": "Where lightning_logs/ is; null for the current folder.",
}
# jsonargparse lists only the options of a preset.
PRESET = {
    "--data.augment=null": "A preset of augmentation: cifar, photos (random crops of any size, "
    "flips, mild colours) or none. null: photos for images of more than 64 pixels, else cifar. "
    "Options of its own stand on it."
}


class Entry(NamedTuple):
    """An option in a page of help, as argparse prints it."""

    names: list[str]  # such as -c, --config
    takes: str  # what stands for its value, such as FILE or {a,b}
    text: str

    @property
    def name(self):
        return next((name for name in self.names if name.startswith("--")), self.names[0])

    @property
    def is_silent(self):
        """Whether it is a page of help of its own, or a file of a part of the options."""
        is_file = self.text == "Path to a configuration file." and self.name not in OUR_WORDS
        return is_file or self.names[0].endswith(".help")


def live_options():
    """Return what `options.json` has to hold."""
    commands = {command: describe(command) for command in start.COMMANDS}
    return {"lightning": metadata.version("lightning"), "commands": commands}


def describe(command):
    docstring = inspect.getdoc(import_module(f"cifar_transfer.commands.{command}"))
    title, usage, *paragraphs = docstring.split("\n\n")
    usage = re.fullmatch(r" +python -m cifar_transfer[. ](.*)", usage)[1]
    text = []
    for paragraph in paragraphs:
        is_table = paragraph.startswith(" ")
        text.append(paragraph if is_table else " ".join(paragraph.split()))
    groups, silent = list_options(command)
    title = title.removesuffix(".")
    return {"title": title, "usage": usage, "text": text, "groups": groups, "silent": silent}


def list_options(command):
    """Return the options by their headings, and the names that the help leaves out."""
    groups = {heading: {} for heading in HEADINGS.values()}
    silent = set()
    for data_module, page in help_pages(command):
        for entry in entries(page):
            if entry.names[0] in NOT_LISTED:
                continue
            if entry.is_silent:
                silent.update(entry.names)
                continue
            option = with_default(entry)
            groups[heading(option, data_module)][option] = description(entry)
            silent.update(name for name in entry.names if name != entry.name)
    if command == "fit":
        gather_shared(groups)
        groups[ANY_DATA] = PRESET | groups[ANY_DATA]
    return {heading: options for heading, options in groups.items() if options}, sorted(silent)


def help_pages(command):
    """Yield the data module that a page of help is about, or "", and the page."""
    if command == "demo":  # has no options of its own
        return
    yield "", live_help(command, "--help")
    if command == "fit":
        for name in DATA_MODULES:
            yield name, live_help(command, f"--data.help={name}")


def live_help(command, argument):
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="10000"),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit, match=r"^0$"),
    ):
        import_module(f"cifar_transfer.commands.{command}").main([argument])
    return printed.getvalue().partition("\nLinked arguments:")[0]


def entries(page):
    for paragraph in re.split(r"\n  (?=\S)", page)[1:]:
        first, *rest = paragraph.split("\n\n")[0].splitlines()
        flags, _, text = first.partition("  ")
        names = re.findall(r"(?<![\w{,.])--?[A-Za-z][\w.]*\+?", flags)
        names = [name for name in names if not name.endswith("+")]
        takes = re.search(r"(?<=\w )[^ ]*[^ ,]", flags)
        yield Entry(names or [flags], takes[0] if takes else "", " ".join([text, *rest]).strip())


def parts_of(entry):
    """Return the words of an entry, "required" or None, and its default or None."""
    kind = r"(?:,? ?type: .*?)?"
    default = r"(?:,? ?default: (.*?))?"
    subclasses = r"(?:, known subclasses: .*)?"
    pattern = rf"(.*?)(?: \((required)?{kind}{default}{subclasses}\)\.?)?"
    return re.fullmatch(pattern, entry.text).groups()


def with_default(entry):
    """Return an option with its default, `--model.lr=0.001`; without one, with what it takes."""
    _, _, default = parts_of(entry)
    if default in ("True", "False"):
        default = default.lower()
    if default is None or (default == "null" and "." in entry.takes):
        default = entry.takes
    is_optional_value = "[=" in default
    if default and entry.name.startswith("-") and not is_optional_value:
        return f"{entry.name}={default}"
    return entry.name


def description(entry):
    words, required, _ = parts_of(entry)
    if entry.name.startswith("--trainer"):
        words = first_sentence(words)
    words = OUR_WORDS.get(entry.name, words[:1].upper() + words[1:])
    choices = re.match(r"\[?\{([^}]*)\}", entry.takes)
    if choices and "true" not in choices[1] and choices[1].split(",")[0] not in words:
        words += f" One of {choices[1].replace(',', ', ')}."
    return f"{words} Required." if required else words


def first_sentence(text):
    """Return the first sentence of one of Lightning's descriptions, without the marks of Sphinx."""
    sentence = re.split(r"\.(?= )|\.$", text)[0].replace("``", "")
    return re.sub(r":\w+:`~?([\w.]+\.)*(\w+)`", r"\2", sentence) + "."


def heading(option, data_module):
    name = option.partition("=")[0]
    group = name.partition(".")[0] if "." in name else ""
    if data_module and group == "--data":
        return HEADINGS[data_module]
    return HEADINGS.get(group, OPTIONS)


def gather_shared(groups):
    """Move the options that all data modules have to a group of their own."""
    own = [groups[HEADINGS[name]] for name in DATA_MODULES]
    for option, text in list(own[0].items()):
        if all(options.get(option) == text for options in own):
            groups[ANY_DATA][option] = text
            for options in own:
                del options[option]


def live_contract(run):
    """Return what `contract.json` has to hold, given the run of a job."""
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    callbacks = {}
    for name, state in checkpoint["callbacks"].items():
        callbacks[name.partition("{")[0]] = sorted(state)
    files = set()
    for path in run.rglob("*"):
        files.add(re.sub(r"tfevents.*", "tfevents", str(path.relative_to(run))))
    return {
        "public names": sorted(cifar_transfer.__all__),
        "checkpoint": sorted(checkpoint),
        "checkpoint with ema": [RAW_STATE_KEY, STEPS_KEY],
        "checkpoint hyper_parameters": sorted(checkpoint["hyper_parameters"]),
        "checkpoint datamodule_hyper_parameters": sorted(checkpoint["datamodule_hyper_parameters"]),
        "checkpoint callbacks": callbacks,
        "result.json": sorted(json.loads((run / "result.json").read_text())),
        "run": sorted(files),
    }


def test_names_and_files_that_users_rely_on_have_not_changed(run):
    assert live_contract(run / RUN) == json.loads(CONTRACT.read_text())


def test_the_help_is_that_of_the_parsers():
    written = json.loads(start.OPTIONS.read_text("utf-8"))
    live = live_options()
    if written["lightning"] != live["lightning"]:  # whose options change from version to version
        for options in (written, live):
            del options["lightning"]
            del options["commands"]["fit"]["groups"][TRAINER]
            del options["commands"]["fit"]["silent"]
    assert live == written, "python tests/test_contract.py writes it anew"


def test_the_defaults_in_the_text_of_fit_are_those_of_the_options():
    fit = json.loads(start.OPTIONS.read_text("utf-8"))["commands"]["fit"]
    defaults = {}
    for options in fit["groups"].values():
        for option in options:
            name, _, default = option.partition("=")
            defaults[name] = default
    in_text = re.findall(r"(--[\w.]+)=.*\((\d[\d.e-]*)\)", "\n".join(fit["text"]))
    assert len(in_text) == 4
    for name, default in in_text:
        assert float(default) == float(defaults[name]), name


def write():
    """Write both files anew."""
    options = json.dumps(live_options(), indent=1, ensure_ascii=False)
    start.OPTIONS.write_text(f"{options}\n", "utf-8")
    with tempfile.TemporaryDirectory() as folder:
        run_fit(folder, *JOB)
        contract = json.dumps(live_contract(Path(folder, RUN)), indent=1)
    CONTRACT.write_text(f"{contract}\n")


if __name__ == "__main__":
    write()
