"""The first second of a command: what is answered without PyTorch, and what the parser gets."""

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
from cifar_transfer.cli import recipes, spelling, start
from cifar_transfer.cli.parsers import PartParser

HEAVY = {"torch", "torchvision", "lightning", "jsonargparse", "matplotlib", "numpy"}
FAST = str(recipes.RECIPES / "fast.yaml")
# Arguments of `python -m`, the exit status, and a part of what is printed.
ANSWERED = [
    ("cifar_transfer", 0, "  fit         Train"),
    ("cifar_transfer --version", 0, f"cifar_transfer {__version__} (torch "),
    ("cifar_transfer fitt", 2, "error: There is no command fitt: did you mean fit?"),
    (
        "cifar_transfer fit --epochs=3",
        2,
        "error: There is no option --epochs: did you mean --trainer.max_epochs?",
    ),
    (
        "cifar_transfer.fit --config fats",
        2,
        "error: --config fats is neither a file nor a recipe: the recipes are acc",
    ),
    (
        "cifar_transfer compare resnet18 --model.lrr=1",
        2,
        "error: There is no option --model.lrr: did you mean",
    ),
]
for command in start.COMMANDS:
    usage = f"usage: python -m cifar_transfer {command}"
    ANSWERED.append((f"cifar_transfer {command} --help", 0, usage))
    ANSWERED.append((f"cifar_transfer {command} --version", 0, "cifar_transfer"))


@pytest.mark.parametrize(("arguments", "status", "text"), ANSWERED)
def test_what_is_answered_within_a_second_imports_nothing_heavy(arguments, status, text):
    command = [sys.executable, "-X", "importtime", "-m", *arguments.split()]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    imported = set()
    errors = []
    for line in process.stderr.splitlines():
        if line.startswith("import time:"):
            imported.add(line.rpartition("|")[2].strip())
        else:
            errors.append(line)
    assert process.returncode == status
    assert text in (process.stdout if status == 0 else "\n".join(errors))
    assert "cifar_transfer.base.errors" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("predict", [], "the following arguments are required: images"),
        ("evaluate", ["--ckpt=x", "--split=train"], "--split takes 'test', 'val', not train"),
        ("evaluate", ["--ckpt=x", "--devices=two"], "--devices takes int, not two"),
        ("evaluate", [], "the following arguments are required: --ckpt"),
        ("embed", ["x.png"], "the following arguments are required: --out"),
        ("figures", [], "the following arguments are required: run"),
        ("figures", ["one", "two"], "unrecognized arguments: two"),
        ("audit", [], r"the following arguments are required: NAME\[=WEIGHTS\]"),
        ("probe", ["--views=two", "resnet18"], "argument --views: invalid int value: 'two'"),
        ("backbones", ["--image_size=big"], "argument --image_size: invalid int value: 'big'"),
    ],
)
def test_a_mistake_in_the_options_of_any_command_is_one_sentence(command, options, message):
    with pytest.raises(UserError, match=rf"^{message} \(All options: --help\)$"):
        import_module(f"cifar_transfer.commands.{command}").main(options)


def test_options_of_fit_are_handed_on_with_spaces_in_their_values():
    parser = PartParser("probe")
    parser.add_argument("backbones", nargs="+")
    parser.add_argument("--out")
    fit_options = [
        "--data.root=my photos",
        "--model.lr=1",
        "--data.root=others",
        "--data.seed",
        "1",
    ]
    options, rest = parser.parse_known_args(["lenet5", "--out=my probe", *fit_options])
    assert options.backbones == ["lenet5"]
    assert options.out == "my probe"
    assert rest == fit_options


def test_ctrl_c_while_pytorch_is_imported_prints_nothing(tmp_path):
    # A process that was told to ignore the signal would hand that on to its children.
    obey_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_transfer.fit", "--model.weights=none"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""},
        preexec_fn=obey_sigint,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == f"cifar_transfer {__version__}: loading PyTorch ...\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGINT
    assert list(tmp_path.iterdir()) == []


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
def test_the_first_hint_is_the_option_that_was_meant(name):
    hints = spelling.similar(name, start.option_names("fit"))
    assert hints[0] == MEANT[name]
    assert len(hints) == len({*hints}) <= 3


@pytest.mark.parametrize("command", start.COMMANDS)
def test_options_of_several_classes_are_listed_once(command):
    names = start.option_names(command)
    assert len(names) == len({*names})


GROUPS_WITH_A_VALUE = {
    "--model=resnet50": r"--model is a group .* did you mean --model\.backbone=resnet50\?",
    "--model resnet50": r"--model is a group .* did you mean --model\.backbone=resnet50\?",
    "--freeze=3": r"did you mean --freeze\.unfreeze_epoch=3\?",
    "--report=false": r"did you mean --report\.figures=false\?",
    "--trainer=gpu": r"did you mean --trainer\.accelerator=gpu\?",
    "--data=photos": r"photos is a folder: give --data=ImageFolderDataModule --data\.root=photos",
}


@pytest.mark.parametrize("text", GROUPS_WITH_A_VALUE)
def test_a_value_where_a_group_of_options_stands_is_explained(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=GROUPS_WITH_A_VALUE[text]):
        start.answer("fit", text.split())


@pytest.mark.parametrize("value", ["options.yaml", "{lr: 0.1}", "lr: 0.1"])
def test_a_file_of_options_may_stand_where_a_group_does(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").touch()
    options = [f"--model={value}", "--freeze", value, "--data=ShapesDataModule"]
    assert start.answer("fit", options) == options


def test_a_name_that_is_like_no_other_gets_no_hint():
    with pytest.raises(UserError, match=r"^There is no option --xyzzy\. All options: --help$"):
        start.answer("fit", ["--xyzzy=1"])
    assert spelling.similar("--xyzzy", []) == []


def test_a_shell_completes_commands_and_options():
    assert start.completions("cifar-transfer f") == ["fit", "figures"]
    lr_options = ["--model.lr_factor", "--model.lr_patience"]
    assert start.completions("cifar-transfer fit --model.lr_") == lr_options
    assert start.completions("cifar-transfer predict pho") == []
    assert start.completions("cifar-transfer x y") == []


LEFT_TO_THE_PARSER = [
    ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
    ["--trainer.logger.save_dir", "there"],
    ["--freeze.phases.epoch=3"],
    ["--data=mine.Photos", "--data.side=3"],
    ["--data", "mine.Photos", "--data.side=3"],
    ["--config", FAST, "--data.side=3"],
    ["--print_config=skip_default"],
    ["--", "--epochs"],
]


@pytest.mark.parametrize("options", LEFT_TO_THE_PARSER, ids=str)
def test_options_of_classes_that_may_be_the_users_are_left_to_the_parser(options):
    assert start.answer("fit", options) == options


@pytest.mark.parametrize(
    "options",
    [
        ["--data.side=3"],
        ["--data=ShapesDataModule", "--data.side=3"],
        ["--data", "cifar_transfer.ShapesDataModule", "--data.side=3"],
    ],
    ids=str,
)
def test_options_of_the_packages_own_data_modules_are_checked(options):
    with pytest.raises(UserError, match=r"There is no option --data\.side"):
        start.answer("fit", options)


@pytest.mark.parametrize("lightning", [metadata.version("lightning"), "2.0"])
def test_options_of_the_trainer_are_checked_if_lightning_is_that_of_the_list(
    tmp_path, monkeypatch, lightning
):
    listed = json.loads(start.OPTIONS.read_text("utf-8"))
    listed["lightning"] = lightning
    monkeypatch.setattr(start, "OPTIONS", tmp_path / "options.json")
    start.OPTIONS.write_text(json.dumps(listed))
    options = ["--trainer.max_epoch=3"]
    if lightning == "2.0":
        assert start.answer("fit", options) == options
    else:
        with pytest.raises(UserError, match=r"max_epoch: did you mean --trainer\.max_epochs"):
            start.answer("fit", options)


def test_a_recipe_is_found_by_its_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = recipes.with_recipe_files(["-c", "fast", "--config=fast"])
    assert options == ["-c", FAST, f"--config={FAST}"]
    assert recipes.with_recipe_names(options) == ["-c", "fast", "--config=fast"]
    own = ["--config=mine/fast.yaml", "--data.root=fast"]
    assert recipes.with_recipe_names(own) == own
    unchanged = ["--config={model: {lr: 0.1}}", "fast"]
    assert recipes.with_recipe_files(unchanged) == unchanged
    Path("fast").touch()
    assert recipes.with_recipe_files(["--config", "fast"]) == ["--config", "fast"]


def test_a_recipe_is_found_in_a_home_and_a_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "folder").mkdir()
    expected = [f"--config={tmp_path / 'mine.yaml'}"]
    assert start.answer("fit", ["--config=~/mine.yaml"]) == expected
    with pytest.raises(UserError, match="folder is a folder: name a file of options, or a recipe"):
        start.answer("fit", ["--config=~/folder"])


def test_the_help_of_fit_fits_the_terminal_and_begins_with_what_people_change_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = start.help_text("fit")
    assert max(len(line) for line in text.splitlines()) <= 80
    names = start.option_names("fit")
    first_table = text.split("\n\n")[3]
    first_options = [
        word.partition("=")[0] for word in first_table.split() if word.startswith("--")
    ]
    assert 10 <= len(first_options) <= 12
    assert {*first_options} <= {*names}


def test_the_help_of_fit_lists_every_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = set()
    for line in start.help_text("fit").splitlines():
        if line.startswith("  --"):
            listed.add(line.strip().split()[0].partition("=")[0].partition("[")[0])
    silent = json.loads(start.OPTIONS.read_text("utf-8"))["commands"]["fit"]["silent"]
    expected = {*start.option_names("fit")} - {*silent} - {"--help", "--version", "--debug"}
    assert "--data.augment.flip" in expected
    assert expected <= listed
