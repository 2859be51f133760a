"""What users rely on, frozen in `contract.json`: options of each command, public names, keys of files.

A change here is a decision: `python tests/test_contract.py` writes the file anew, and its diff shows what was decided.
"""

import contextlib
import io
import json
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import RUN, TINY, run_fit

import cifar_transfer
from cifar_transfer.training.average import RAW, STEPS

FILE = Path(__file__).with_name("contract.json")
COMMANDS = ("fit", "evaluate", "predict", "export", "compare", "backbones", "figures", "serve", "demo")
DATA_MODULES = ("CIFAR10DataModule", "ImageFolderDataModule", "ShapesDataModule")
JOB = [*TINY, "--trainer.max_epochs=1", "--freeze.unfreeze_epoch=0", "--report.figures=true"]


def help_of(command, *arguments):
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with (
        mock.patch.object(sys, "argv", [command, *(arguments or ("--help",))]),
        mock.patch.dict(os.environ, COLUMNS="10000"),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit, match=r"^0$"),
    ):
        runpy.run_module(f"cifar_transfer.{command}", run_name="__main__")
    printed.seek(0)
    return printed.read()


def options(text):
    """Option: its default as the help tells it, but for those of Lightning's Trainer, which are Lightning's."""
    found = {}
    for entry in re.split(r"\n  (?=-)", text.rpartition("all options:")[2]):
        names = re.match(r"(?:-\w, )?(--[\w.]+)", entry)
        if names and not names[1].startswith("--trainer"):
            default = re.search(r"default: (.*?)\)", " ".join(entry.split()))
            # The known subclasses follow in the order in which they were imported.
            found[names[1]] = default[1].partition(", known subclasses")[0] if default else ""
    return found


def contract(run):
    demo = {"demo": {}}  # its options are those of fit
    commands = {command: options(help_of(command)) for command in COMMANDS if command != "demo"} | demo
    for name in DATA_MODULES:
        found = options(help_of("fit", f"--data.help={name}"))
        commands["fit"] |= {f"{name} {option}": default for option, default in found.items()}
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    callbacks = {re.sub(r"\{.*", "", name): sorted(state) for name, state in checkpoint["callbacks"].items()}
    return {
        "public names": sorted(cifar_transfer.__all__),
        "commands": commands,
        "checkpoint": sorted(checkpoint),
        "checkpoint with ema": [RAW, STEPS],
        "checkpoint hyper_parameters": sorted(checkpoint["hyper_parameters"]),
        "checkpoint datamodule_hyper_parameters": sorted(checkpoint["datamodule_hyper_parameters"]),
        "checkpoint callbacks": callbacks,
        "result.json": sorted(json.loads((run / "result.json").read_text())),
        "run": sorted({re.sub(r"tfevents.*", "tfevents", str(path.relative_to(run))) for path in run.rglob("*")}),
    }


def test_nothing_that_users_rely_on_has_changed(run):
    assert contract(run / RUN) == json.loads(FILE.read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run_fit(folder, *JOB)
        FILE.write_text(json.dumps(contract(Path(folder, RUN)), indent=1) + "\n")
