"""The folder of a run: made when training starts, owned by one process, untouched by a refusal."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_same_weights, curves, run_fit, untouched, write_images
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback

from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands import compare, demo
from cifar_transfer.commands.fit import fit
from cifar_transfer.results.run_metrics import read_curves
from cifar_transfer.training import run as runs

SMALL = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--data=ShapesDataModule",
    "--data.train_images=100",
    "--data.test_images=30",
    "--data.batch_size=20",
    "--trainer.accelerator=cpu",
    "--report.figures=false",
    "--freeze.unfreeze_epoch=0",
]
STOPPING = [
    "--trainer.callbacks=EarlyStopping",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.callbacks.patience=8",
]
COMMAND = [sys.executable, "-m", "cifar_transfer.fit"]


@pytest.fixture(autouse=True)
def _work_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs that is not the first in its folder."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "lightning_logs" / "version_6").mkdir(parents=True)
    run_fit(folder, *SMALL, *STOPPING, "--trainer.max_epochs=2")
    return folder / "lightning_logs" / "version_7"


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "lightning_logs" / "version_7")
    return Path("lightning_logs/version_7")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.lr=-1"], "lr is -1"),
        (["--data=ImageFolderDataModule", "--data.root=nowhere"], "is missing"),
        (["--model.image_size=8"], "cannot take images of 8 pixels"),
        (
            ["--freeze.unfreeze_epoch=1", '--freeze.frozen=["nothing"]'],
            "No parameter's name begins",
        ),
        (["--model.train_sizes=[32, 32]", "--trainer.max_epochs=-1"], "set --trainer.max_epochs"),
        (["--ckpt_path=nowhere.ckpt"], "does not exist"),
        (
            ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"],
            "strategy=ddp_spawn starts processes that end with their results: take ddp",
        ),
        (["--trainer.default_root_dir=/dev/null/runs"], "cannot be written"),
        (
            ["--trainer.limit_train_batches=0"],
            r"limit_train_batches=0 trains nothing: give a number of batches",
        ),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
            r"^EarlyStopping monitors val_loss, and there is no such figure: take one of "
            r"val/loss, val/acc, val/balanced_accuracy, val/macro_f1, train/loss_epoch",
        ),
        (
            ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=accuracy"],
            r"^ModelCheckpoint monitors accuracy, and there is no such figure",
        ),
        (
            ["--trainer.sync_batchnorm=true", "--trainer.devices=2"],
            "sync_batchnorm=true needs GPUs: leave it out on CPUs",
        ),
    ],
)
def test_a_refused_start_leaves_nothing(tmp_path, options, words):
    with untouched(tmp_path), pytest.raises(UserError, match=words):
        fit([*SMALL, "--trainer.max_epochs=1", *options])


def test_the_first_accepted_run_is_version_0():
    with pytest.raises(UserError, match="8 pixels"):
        fit([*SMALL, "--model.image_size=8"])
    outcome = fit([*SMALL, "--trainer.max_epochs=1"])
    assert outcome.best == Path("lightning_logs/version_0/checkpoints/best.ckpt")
    assert os.listdir("lightning_logs") == ["version_0"]


def test_a_folder_that_another_run_takes_meanwhile_is_left_to_it(monkeypatch):
    """It did not exist when the name was chosen. A checkpoint of the user's moves, too."""
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    cli = FitCLI([*SMALL, "--trainer.max_epochs=1", *keep])
    os.makedirs("lightning_logs/version_0")
    listed = iter([cli.folder.path, cli.folder.path.with_name("version_1")])
    monkeypatch.setattr(runs, "new_versions", lambda logs: listed)
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.folder.release()
    assert os.listdir("lightning_logs/version_0") == []
    written = {path.name for path in Path("lightning_logs/version_1").rglob("*.*")}
    assert {"config.yaml", "best.ckpt", "last.ckpt", ".lock", "hparams.yaml"} <= written
    assert curves(Path("lightning_logs/version_1"))["val/acc"]


LOGGERS = {
    "none": ["--trainer.logger=false", "--report.figures=true"],
    "CSV": [
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.logger.name=csv",
    ],
    "fixed": [
        "--trainer.logger=TensorBoardLogger",
        "--trainer.logger.save_dir=./board",
        "--trainer.logger.version=v1",
    ],
    "own": ["--trainer.logger=others_logger.DotLogger"],
    "two": [
        "--trainer.logger+=CSVLogger",
        "--trainer.logger.save_dir=csv",
        "--trainer.logger+=TensorBoardLogger",
        "--trainer.logger.save_dir=board",
    ],
}
# What the closing lines name for the second run of each.
CURVES = {
    "none": "lightning_logs/version_1/figures",
    "CSV": "lightning_logs/version_1/metrics.csv",
    "fixed": "tensorboard --logdir board/lightning_logs",
    "own": "lightning_logs/version_1/metrics.csv",
    "two": "tensorboard --logdir board/lightning_logs",
}
DOT_LOGGER = """
from lightning.pytorch.loggers.logger import Logger

class DotLogger(Logger):
    name = "project"
    version = "same"
    save_dir = "."
    def log_metrics(self, metrics, step=None): pass
    def log_hyperparams(self, params, *args): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.whole] * (kind in ("CSV", "fixed")))
        for kind in LOGGERS
    ],
)
def test_whatever_the_logger_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys, kind):
    """The name of a folder has several spellings: "./x" is "x"."""
    monkeypatch.syspath_prepend(tmp_path)
    Path("others_logger.py").write_text(DOT_LOGGER)
    options = [*SMALL, *LOGGERS[kind], "--trainer.max_epochs=2"]
    first = fit(options)
    assert first.best == Path("lightning_logs/version_0/checkpoints/best.ckpt")
    with untouched(first.best.parents[1]):
        second = fit([*options, "--seed_everything=1"])
    assert second.best == Path("lightning_logs/version_1/checkpoints/best.ckpt")
    for outcome in (first, second):
        run = outcome.best.parents[1]
        names = {str(path.relative_to(run)) for path in run.rglob("*.*")}
        assert names >= {
            "config.yaml",
            "result.json",
            "splits.json.gz",
            "metrics.csv",
            "checkpoints/best.ckpt",
            "checkpoints/last.ckpt",
        }
        assert len(read_curves(run).val_accuracy.y) == 2
        states = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
        (best,) = (state for name, state in states.items() if "'val/acc'" in name)
        assert outcome.scores["best/val_acc"] == pytest.approx(float(best["best_model_score"]))
    figures = {path.name for path in Path("lightning_logs/version_1").rglob("*.png")}
    assert ("--report.figures=true" in options) == ({"augmented.png", "epochs.png"} < figures)
    printed = capsys.readouterr().out
    assert "No validation took place" not in printed
    assert f"look at it     {CURVES[kind]}\n" in printed
    assert not Path("checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "sweep/lr 3"])
def test_a_run_with_a_name_is_never_written_into(tmp_path, monkeypatch, name):
    options = [*SMALL, f"--run={name}", "--trainer.max_epochs=1"]
    folder = Path("lightning_logs", name)
    outcome = fit(options)
    assert outcome.best == folder / "checkpoints/best.ckpt"
    assert curves(folder)["val/acc"]
    assert not Path("lightning_logs/version_0").exists()
    message = (
        rf"^{folder} is there already, and a run writes into no folder but its own: give --run "
        rf"another name, or continue that run with --resume={folder}\.$"
    )
    with untouched(tmp_path), pytest.raises(UserError, match=message):
        fit(options)
    resumed = fit([f"--resume={folder}", "--trainer.max_epochs=2"])
    assert resumed.best == outcome.best
    assert "run" not in yaml.safe_load((folder / "config.yaml").read_text())
    with untouched(tmp_path), pytest.raises(UserError, match="leave --run out"):
        fit([f"--resume={folder}", "--run=other"])
    with untouched(tmp_path), pytest.raises(UserError, match="keeps no other runs"):
        fit([*SMALL, f"--run={name}/inner"])


@pytest.mark.parametrize(
    "name", ["..", "a/../b", "/tmp/x", "a//b", "", ".x", "-x", "a\nb", "x" * 256]
)
def test_what_is_no_name_of_a_folder_is_refused(tmp_path, name):
    with (
        untouched(tmp_path),
        pytest.raises(UserError, match=r"is no name of a folder in lightning_"),
    ):
        fit([*SMALL, f"--run={name}"])


def test_a_folder_that_is_made_while_the_run_is_set_up_is_not_written_into(tmp_path):
    cli = FitCLI([*SMALL, "--run=small", "--trainer.max_epochs=1"])
    os.makedirs("lightning_logs/small")
    with untouched(tmp_path), pytest.raises(UserError, match="lightning_logs/small is there alrea"):
        cli.trainer.fit(cli.model, cli.datamodule)


@pytest.mark.slow
def test_two_processes_write_into_one_folder_with_a_name(tmp_path):
    two = [*SMALL, "--trainer.devices=2", "--run=two", "--trainer.max_epochs=1"]
    run_fit(tmp_path, *two)
    assert (tmp_path / "lightning_logs/two/result.json").is_file()
    assert os.listdir(tmp_path / "lightning_logs") == ["two"]
    with untouched(tmp_path):
        refused = run_fit(tmp_path, *two, expect=2)
    assert "is there already" in refused.stderr


@pytest.mark.parametrize("command", [compare, demo])
def test_commands_that_fit_several_times_name_their_runs_themselves(tmp_path, command):
    options = ["lenet5"] if command is compare else []
    with untouched(tmp_path), pytest.raises(UserError, match="itself: leave --run out"):
        command.main([*options, "--run=mine"])


def test_the_results_of_other_commands_go_into_no_folder_of_a_run(tmp_path, again):
    with (
        untouched(tmp_path),
        pytest.raises(UserError, match="is the folder of a run: name another"),
    ):
        compare.main(["lenet5", f"--out={again}"])


MONITORING = """
from lightning.pytorch import Callback

class Mine(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("mine", 1.0)
"""


def test_a_figure_of_a_callback_of_the_users_own_may_be_monitored(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    Path("monitoring.py").write_text(MONITORING)
    callbacks = ["--trainer.callbacks=monitoring.Mine", "--trainer.callbacks+=EarlyStopping"]
    options = ["--trainer.callbacks.monitor=mine", "--trainer.callbacks.patience=2"]
    fit([*SMALL, *callbacks, *options, "--trainer.max_epochs=9"])
    printed = capsys.readouterr().out
    assert "Stopped early: mine has not improved for 2 validations (patience=2).\n" in printed
    assert "  3/9  " in printed
    assert "  4/9  " not in printed


def test_a_run_that_stops_before_the_backbone_trains_says_so(capsys):
    options = ["--freeze.unfreeze_epoch=3", "--trainer.callbacks+=EarlyStopping"]
    options += ["--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.min_delta=9"]
    with pytest.warns(UserWarning, match="The backbone has learned nothing"):
        fit([*SMALL, *options, "--trainer.callbacks.patience=1", "--trainer.max_epochs=9"])
    printed = capsys.readouterr().out
    assert "(patience=1). The phase that trains all has not begun: raise the patience" in printed


def test_without_a_validation_the_last_weights_are_the_best(capsys):
    resume = "--resume=lightning_logs/version_0"
    best = Path("lightning_logs/version_0/checkpoints/best.ckpt")
    for steps in (2, 3):
        fit([*SMALL, "--trainer.max_steps=2"] if steps == 2 else [resume, "--trainer.max_steps=3"])
        assert "best.ckpt keeps the last weights" in capsys.readouterr().out
        assert torch.load(best, weights_only=True)["global_step"] == steps
    fit([resume, "--trainer.max_epochs=1", "--trainer.max_steps=-1"])
    assert "best.ckpt keeps" not in capsys.readouterr().out


def test_the_configuration_of_a_run_that_was_continued_begins_a_new_one(again):
    fit([f"--resume={again}", "--trainer.max_epochs=3"])
    config = yaml.safe_load((again / "config.yaml").read_text())
    assert not {"resume", "ckpt_path", "config"} & set(config)
    assert config["trainer"]["max_epochs"] == 3
    with untouched(again):
        outcome = fit([f"--config={again / 'config.yaml'}", "--trainer.max_epochs=1"])
    run = outcome.best.parents[1]
    assert run != again
    assert len(curves(run)["val/acc"]) == 1, "from the beginning"


@pytest.mark.slow
def test_a_run_belongs_to_one_process(tmp_path, again):
    """Until that process is gone, however it ends."""
    resume = f"--resume={again}"
    stopped = [resume, "--trainer.max_epochs=100000"]
    with subprocess.Popen(
        [*COMMAND, *stopped], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as owner:
        try:
            assert any(line.strip().startswith("3/") for line in owner.stdout)
            owner.send_signal(signal.SIGSTOP)  # so that it writes nothing while others are refused
            os.waitpid(owner.pid, os.WUNTRACED)
            with untouched(tmp_path):
                refused = run_fit(tmp_path, resume, expect=2)
                with pytest.raises(UserError, match="trained by another process"):
                    fit([resume, "--trainer.max_epochs=3"])
        finally:
            owner.kill()
    assert refused.stderr.splitlines()[-1] == (
        f"error: {again} is being trained by another process: wait for its end, or stop it."
    )
    done = len(curves(again)["val/acc"])
    fit([resume, f"--trainer.max_epochs={done + 2}"])
    assert curves(again)["val/acc"][-1][0] >= done


CHANGES = [
    (["--model.lr=0.5"], r"model\.lr=0\.5 differs from 0\.001"),
    (["--model.image_size=40"], r"model\.image_size=40 differs from null"),
    (["--model.weights=other.pth"], r"model\.weights=other\.pth differs from none"),
    (["--data.val_fraction=0.5"], r"data\.val_fraction=0\.5 differs from 0\.1"),
    (["--data.batch_size=10"], r"data\.batch_size=10 differs from 20"),
    (["--data.augment.flip=0"], r"data\.augment\.flip=0\.0 differs from 0\.5"),
    (["--data.augment=photos"], r"data\.augment\.preset=photos differs from cifar"),
    (["--data=CIFAR10DataModule"], r"data=cifar_transfer.*\.CIFAR10DataModule differs from cifar_"),
    (["--seed_everything=1"], "seed_everything=1 differs from 0"),
    (["--freeze.batch_norm=train"], r"freeze\.batch_norm=train differs from eval"),
    (["--trainer.precision=bf16-mixed"], r"trainer\.precision=bf16-mixed differs from null"),
    (["--trainer.limit_train_batches=2"], r"limit_train_batches=2(\.0)? differs from null"),
    (
        ["--trainer.callbacks.patience=10"],
        r"EarlyStopping\.patience=10 differs from 8, with which the run began: leave it out to "
        r"continue the run, or begin a new one from its weights with --model\.weights=CHECKPOINT",
    ),
    (
        ["--trainer.callbacks+=LearningRateFinder"],
        r"trainer\.callbacks=\['EarlyStopping', 'LearningRateFinder'\] differs from",
    ),
]


@pytest.mark.parametrize(("options", "words"), CHANGES, ids=lambda value: value[0][2:30])
@pytest.mark.parametrize("way", ["resume", "ckpt_path"])
def test_a_changed_option_is_refused_with_both_values(tmp_path, again, way, options, words):
    start = [f"--resume={again}"]
    if way == "ckpt_path":
        start = [*SMALL, *STOPPING, f"--ckpt_path={again}/checkpoints/last.ckpt"]
    with untouched(tmp_path), pytest.raises(UserError, match=words):
        fit([*start, "--trainer.max_epochs=3", *options])


def test_a_change_is_refused_before_anything_is_decoded(tmp_path):
    write_images(tmp_path / "photos" / "train", 12)
    options = [option for option in SMALL if not option.startswith("--data")]
    options += ["--data=ImageFolderDataModule", "--data.root=photos", "--data.batch_size=8"]
    run = fit([*options, "--trainer.max_epochs=1"]).best.parents[1]
    shutil.rmtree(tmp_path / "photos" / ".cifar_transfer")
    Path("list.csv").write_text("image\ntrain/cat/000.png\n")
    for change in ("--model.lr=0.5", "--data.val_fraction=0.5", "--data.leave_out=list.csv"):
        with untouched(tmp_path), pytest.raises(UserError, match="with which the run began"):
            fit([f"--resume={run}", change])


@pytest.mark.slow
def test_what_makes_no_other_run_may_change(again):
    changes = [
        "--trainer.max_epochs=3",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.profiler=simple",
        "--trainer.callbacks+=TQDMProgressBar",
        "--data.eval_batch_size=10",
        "--data.num_workers=0",
        "--report.figures=true",
    ]
    outcome = fit([f"--resume={again}", *changes])
    assert outcome.best.parents[1] == again
    assert torch.load(again / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


def test_values_of_the_preset_may_be_given_to_a_run_that_began_without(again):
    """They are those that it has had."""
    shutil.copytree(again, "lightning_logs/version_8")
    fit([f"--resume={again}", "--trainer.max_epochs=3"])
    same = ["--data.augment.flip=0.5", "--data.augment.preset=cifar"]
    fit(["--resume=lightning_logs/version_8", "--trainer.max_epochs=3", *same])
    last = Path("lightning_logs/version_8/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert_same_weights(last, again / "checkpoints/last.ckpt")


def test_early_stopping_keeps_its_patience_from_python(again):
    """Lightning's takes over the stored one without a word."""
    cli = FitCLI([*SMALL, "--trainer.max_epochs=3"])
    stopping = EarlyStopping("val/loss", patience=10)
    cli.trainer.callbacks.insert(1, stopping)
    with pytest.raises(UserError, match=r"EarlyStopping\.patience=10 differs from 8"):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=again / "checkpoints/last.ckpt")
    assert not Path("lightning_logs/version_8").exists()


@pytest.mark.parametrize("name", ["processes", "training_images"])
def test_within_an_epoch_neither_processes_nor_images_change(again, name):
    """They would skip images of the epoch, or repeat some."""
    last = again / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    state = checkpoint["callbacks"]["RunFolder"]
    state[name] = {"processes": 3, "training_images": "7 images (00000000)"}[name]
    torch.save(checkpoint, last)
    fit([f"--resume={again}"])
    checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
    torch.save(checkpoint, last)
    with pytest.raises(UserError, match=rf"an epoch of {re.escape(str(state[name]))}.*skip"):
        fit([f"--resume={again}", "--trainer.max_epochs=3"])


def test_a_run_without_a_lock_gets_one_only_when_it_is_accepted(again):
    (again / ".lock").unlink()
    with untouched(again), pytest.raises(UserError, match="lr"):
        fit([f"--resume={again}", "--trainer.max_epochs=3", "--model.lr=0.5"])
    fit([f"--resume={again}", "--trainer.max_epochs=3"])
    assert (again / ".lock").is_file()


def test_a_fit_that_is_interrupted_before_it_starts_leaves_nothing(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    cli = FitCLI([*SMALL, "--trainer.max_epochs=1"])
    cli.trainer.callbacks.append(LambdaCallback(on_fit_start=interrupt))
    with untouched(tmp_path), pytest.raises(SystemExit, match="1"):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert not cli.folder.started


def test_a_profile_lies_in_the_folder_of_the_run():
    profiler = ["--trainer.profiler=SimpleProfiler", "--trainer.profiler.filename=times"]
    fit([*SMALL, *profiler, "--trainer.max_epochs=1"])
    assert Path("lightning_logs/version_0/fit-times.txt").is_file()
