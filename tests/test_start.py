"""The first second of a command: what is answered without PyTorch, and what is left to the parser."""

import json
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

import pytest

from cifar_transfer import __version__
from cifar_transfer.base.errors import UserError
from cifar_transfer.cli import start
from cifar_transfer.cli.parsers import PartParser

HEAVY = {"torch", "torchvision", "lightning", "jsonargparse", "matplotlib", "numpy"}
ABOUT = start.OPTIONS.read_text("utf-8")
ANSWERED = [
    (["cifar_transfer"], 0, "  fit         Train"),
    (["cifar_transfer", "--version"], 0, f"cifar_transfer {__version__} (torch "),
    (["cifar_transfer", "fitt"], 2, "error: There is no command fitt: did you mean fit?"),
    (
        ["cifar_transfer", "fit", "--epochs=3"],
        2,
        "error: There is no option --epochs: did you mean --trainer.max_epochs?",
    ),
    (
        ["cifar_transfer.fit", "--config", "fats"],
        2,
        "error: --config fats is neither a file nor a recipe: the recipes are acc",
    ),
    (
        ["cifar_transfer", "compare", "resnet18", "--model.lrr=1"],
        2,
        "error: There is no option --model.lrr: did you mean",
    ),
    *(
        (["cifar_transfer", name, "--help"], 0, f"usage: python -m cifar_transfer {name}")
        for name in start.COMMANDS
    ),
    *((["cifar_transfer", name, "--version"], 0, "cifar_transfer") for name in start.COMMANDS),
]


@pytest.mark.parametrize(("command", "status", "says"), ANSWERED, ids=lambda value: str(value)[:60])
def test_answers_within_a_second_import_nothing_heavy(command, status, says):
    command = [sys.executable, "-X", "importtime", "-m", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    imported = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == status
    assert says in (done.stdout if status == 0 else "\n".join(said))
    assert "cifar_transfer.base.errors" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("predict", [], "the following arguments are required: images"),
        ("export", ["--ckpt=x", "--to=coreml"], r"--to takes .*'onnx', .*, not coreml"),
        ("evaluate", ["--ckpt=x", "--devices=two"], "--devices takes int, not two"),
        ("figures", ["one", "two"], "unrecognized arguments: two"),
        ("audit", [], r"the following arguments are required: NAME\[=WEIGHTS\]"),
        ("probe", ["--views=two", "resnet18"], "argument --views: invalid int value: 'two'"),
        ("backbones", ["--image_size=big"], "argument --image_size: invalid int value: 'big'"),
    ],
)
def test_a_mistake_in_the_options_of_any_command_is_a_sentence(command, options, says):
    with pytest.raises(UserError, match=rf"^{says} \(All options: --help\)$"):
        import_module(f"cifar_transfer.commands.{command}").main(options)


def test_a_value_with_a_space_is_handed_on():
    parser = PartParser("probe")
    parser.add_argument("backbones", nargs="+")
    parser.add_argument("--out")
    args = [
        "lenet5",
        "--data.root=my photos",
        "--out=my probe",
        "--model.lr=1",
        "--data.root=others",
        "--data.seed",
        "1",
    ]
    given, rest = parser.parse_known_args(args)
    assert (given.backbones, given.out) == (["lenet5"], "my probe")
    assert rest == [
        "--data.root=my photos",
        "--model.lr=1",
        "--data.root=others",
        "--data.seed",
        "1",
    ]


def test_ctrl_c_while_pytorch_is_imported_is_quiet(tmp_path):
    command = [sys.executable, "-m", "cifar_transfer.fit", "--model.weights=none"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""}
    streams = {"stderr": subprocess.PIPE, "text": True}
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # also if this process was told to ignore it
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heard, **streams)
    assert process.stderr.readline() == f"cifar_transfer {__version__}: loading PyTorch ...\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGINT
    assert not list(tmp_path.iterdir())


MEANT = {
    "--epochs": "--trainer.max_epochs",
    "--max_epoch": "--trainer.max_epochs",
    "--lr": "--model.lr",
    "--learning-rate": "--model.lr",
    "--batch_size": "--data.batch_size",
    "--batch-size": "--data.batch_size",
    "--gpus": "--trainer.devices",
    "--backbone": "--model.backbone",
    "--network": "--model.backbone",
    "--model.backbon": "--model.backbone",
    "--resume_from": "--resume",
    "--freeze_epochs": "--freeze.unfreeze_epoch",
    "--workers": "--data.num_workers",
    "--seed": "--seed_everything",
    "--data.augment.flp": "--data.augment.flip",
    "--trainer.max_epoch": "--trainer.max_epochs",
}


@pytest.mark.parametrize("name", MEANT)
def test_a_near_name_means_the_right_option(name):
    assert start.near(name, start.known_options("fit"))[0] == MEANT[name]


def test_a_shell_completes_commands_and_options():
    assert start.completions("cifar-transfer f") == ["fit", "figures"]
    assert start.completions("cifar-transfer fit --model.lr_") == [
        "--model.lr_factor",
        "--model.lr_patience",
    ]
    assert start.completions("cifar-transfer predict pho") == []
    assert start.completions("cifar-transfer x y") == []


def test_a_name_like_none_gets_no_hint():
    with pytest.raises(UserError, match=r"^There is no option --xyzzy\. All options: --help$"):
        start.answer("fit", ["--xyzzy=1"])


OWN = "--data=mine.Photos"
LEFT_TO_THE_PARSER = [
    ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
    ["--trainer.logger.save_dir", "there"],
    ["--freeze.phases.epoch=3"],
    [OWN, "--data.side=3"],
    ["--config", str(start.RECIPES / "fast.yaml"), "--data.side=3"],
    ["--print_config=skip_default"],
    ["--", "--epochs"],
]


@pytest.mark.parametrize("options", LEFT_TO_THE_PARSER, ids=str)
def test_options_of_classes_that_others_may_have_written_are_left_to_the_parser(options):
    assert start.answer("fit", options) == options


@pytest.mark.parametrize(
    "options", [["--data.side=3"], ["--data=ShapesDataModule", "--data.side=3"]], ids=str
)
def test_options_of_our_own_data_modules_are_known(options):
    with pytest.raises(UserError, match=r"There is no option --data\.side"):
        start.answer("fit", options)


def test_another_lightning_may_have_other_options(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "OPTIONS", tmp_path / "options.json")
    start.OPTIONS.write_text(
        json.dumps(json.loads(ABOUT) | {"lightning": metadata.version("lightning")})
    )
    with pytest.raises(
        UserError, match=r"--trainer\.max_epoch: did you mean --trainer\.max_epochs"
    ):
        start.answer("fit", ["--trainer.max_epoch=3"])
    start.OPTIONS.write_text(json.dumps(json.loads(ABOUT) | {"lightning": "2.0"}))
    assert start.answer("fit", ["--trainer.max_epoch=3"]) == ["--trainer.max_epoch=3"]


def test_a_recipe_is_found_by_its_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(start.RECIPES / "fast.yaml")
    assert start.with_recipes(["-c", "fast", "--config=fast"]) == ["-c", path, f"--config={path}"]
    assert start.with_recipes(["--config={model: {lr: 0.1}}", "fast"]) == [
        "--config={model: {lr: 0.1}}",
        "fast",
    ]
    Path("fast").touch()
    assert start.with_recipes(["--config", "fast"]) == ["--config", "fast"]


def test_the_help_fits_the_terminal_and_begins_with_what_people_change_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = start.help_text("fit")
    known = start.known_options("fit")
    shown = [
        word.partition("=")[0] for word in text.split("\n\n")[3].split() if word.startswith("--")
    ]
    assert 10 <= len(shown) <= 12
    assert set(shown) <= set(known)
    assert max(map(len, text.splitlines())) <= 80
    listed = {line.split("=")[0].strip() for line in text.splitlines() if line.startswith("  --")}
    assert {
        "--model.lr",
        "--data.augment.flip",
        "--data.decode_size",
        "--trainer.precision",
    } <= listed
    silent = json.loads(ABOUT)["commands"]["fit"]["silent"]
    assert {*known} - {*silent} - {"--help", "--version"} <= {
        name.split()[0].split("[")[0] for name in listed
    }
