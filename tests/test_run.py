"""The folder of a run: made when training starts, owned by one process, and untouched by what is refused."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import curves, run_fit, untouched, write_images
from lightning.pytorch.callbacks import Callback

from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.commands.fit import fit
from cifar_transfer.training.resume import compare

SMALL = [
    *(
        "--model.backbone=lenet5",
        "--model.weights=none",
        "--data=ShapesDataModule",
        "--trainer.accelerator=cpu",
    ),
    *(
        "--data.train_images=100",
        "--data.test_images=30",
        "--data.batch_size=20",
        "--report.figures=false",
    ),
    *("--freeze.unfreeze_epoch=0", "--trainer.enable_model_summary=false"),
]
COMMAND = [sys.executable, "-m", "cifar_transfer.fit"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs that is not the first in its folder."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "lightning_logs" / "version_6").mkdir(parents=True)
    run_fit(folder, *SMALL, "--trainer.max_epochs=2")
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
        (["--trainer.default_root_dir=/dev/null/runs"], "cannot be written"),
    ],
)
def test_a_refused_start_leaves_nothing_and_the_first_run_is_version_0(tmp_path, options, words):
    with untouched(tmp_path), pytest.raises(UserError, match=words):
        fit([*SMALL, "--trainer.max_epochs=1", *options])


def test_the_first_accepted_run_is_version_0(tmp_path):
    with pytest.raises(UserError, match="8 pixels"):
        fit([*SMALL, "--model.image_size=8"])
    assert fit([*SMALL, "--trainer.max_epochs=1"]).best == Path(
        "lightning_logs/version_0/checkpoints/best.ckpt"
    )
    assert os.listdir("lightning_logs") == ["version_0"]


def test_a_folder_that_another_run_takes_meanwhile_is_left_to_it(tmp_path):
    """It was not there when names were given out, to a checkpoint of the user's too."""
    kept = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    cli = FitCLI([*SMALL, "--trainer.max_epochs=1", *kept])

    class Other(Callback):
        def on_fit_start(self, trainer, pl_module):
            os.makedirs("lightning_logs/version_0")

    cli.trainer.callbacks.append(Other())
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.folder.release()
    assert os.listdir("lightning_logs/version_0") == []
    written = {path.name for path in Path("lightning_logs/version_1").rglob("*.*")}
    assert {"config.yaml", "best.ckpt", "last.ckpt", ".lock", "hparams.yaml"} <= written
    assert curves(Path("lightning_logs/version_1"))["val/acc"]


def test_the_configuration_of_a_run_that_was_continued_begins_a_new_one(again, finished):
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
    more = [resume, "--trainer.max_epochs=100000"]
    with subprocess.Popen(
        [*COMMAND, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
    assert [step for step, _ in curves(again)["val/acc"]][-1] >= done


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--seed_everything=1", "--data.val_fraction=0.5"],
            "would make validation images of images",
        ),
        (
            ["--data.val_fraction=0.5"],
            r"data.val_fraction=0.5 would make validation images .* written with 0.1",
        ),
        (["--seed_everything=1"], "seed_everything=1 would make validation images"),
        (["--data.train_images=120"], "data.train_images=120 would make"),
        (
            ["--model.lr=0.5"],
            "model.lr=0.5 would be undone by the checkpoint, which was written with 0.001",
        ),
        (
            ["--freeze.unfreeze_epoch=3"],
            "freeze.unfreeze_epoch=3 differs from 1, with which the run began",
        ),
        (["--freeze.batch_norm=train"], "freeze.batch_norm=train differs from eval"),
    ],
)
@pytest.mark.parametrize("way", ["--resume={}", "--ckpt_path={}/checkpoints/last.ckpt"])
def test_a_change_that_would_spoil_the_run_is_refused(tmp_path, again, way, options, words):
    with untouched(tmp_path), pytest.raises(UserError, match=words):
        fit([*SMALL, way.format(again), "--trainer.max_epochs=3", *options])


def test_a_resume_is_refused_before_anything_is_decoded(tmp_path):
    write_images(tmp_path / "photos" / "train", 12)
    options = [
        "--model.backbone=lenet5",
        "--model.weights=none",
        "--data=ImageFolderDataModule",
        "--data.root=photos",
    ]
    options += [
        "--data.batch_size=8",
        "--report.figures=false",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
    ]
    run = fit(options).best.parents[1]
    shutil.rmtree(tmp_path / "photos" / ".cifar_transfer")
    for change in ("--model.lr=0.5", "--data.val_fraction=0.5"):
        with untouched(tmp_path), pytest.raises(UserError, match="the checkpoint"):
            fit([f"--resume={run}", change])


def test_other_changes_are_said_with_their_effect(again, caplog):
    changes = [
        "--trainer.max_epochs=3",
        "--data.batch_size=30",
        "--data.eval_batch_size=10",
        "--data.augment.flip=0",
    ]
    fit([f"--resume={again}", *changes])
    said = [line for line in caplog.messages if " is changed from " in line]
    assert said == [
        "data.augment is changed from {'flip': 0.5} to {'flip': 0.0}: training images are augmented in another way.",
        "data.batch_size is changed from 20 to 30: an epoch has another number of steps.",
        "max_epochs is changed from 2 to 3: the run ends after that many epochs.",
    ], "that of evaluation changes no result"


def test_within_an_epoch_neither_the_batches_nor_the_processes_change():
    for name, effect in (
        ("data.batch_size", "another number of steps"),
        ("processes", "another number of images"),
    ):
        with pytest.raises(UserError, match=f"{name}=4 would skip images of the epoch"):
            compare({name: 2}, {name: 4}, within_epoch=True, unfrozen=False)
        (change,) = compare({name: 2}, {name: 4}, within_epoch=False, unfrozen=False)
        assert effect in change


def test_a_run_without_a_lock_gets_one_only_when_it_is_accepted(again):
    (again / ".lock").unlink()
    with untouched(again), pytest.raises(UserError, match="lr"):
        fit([f"--resume={again}", "--trainer.max_epochs=3", "--model.lr=0.5"])
    fit([f"--resume={again}", "--trainer.max_epochs=3"])
    assert (again / ".lock").is_file()


@pytest.fixture
def job(monkeypatch):
    """The environment of a SLURM job of one task."""
    names = {
        "JOB_ID": "47",
        "JOB_NAME": "sweep",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", "/nowhere")  # neither srun nor scontrol


def test_two_fits_in_one_slurm_job_are_two_runs_and_each_continues_its_own(job, monkeypatch):
    logs = Path("lightning_logs")
    (logs / "slurm_470").mkdir(parents=True)  # of another job
    rates = [[*SMALL, f"--model.lr={lr}"] for lr in (0.001, 0.002)]
    folders = [
        fit([*options, "--trainer.max_epochs=1"]).best.parents[1] for options in (*rates, rates[0])
    ]
    assert folders == [logs / name for name in ("slurm_47", "slurm_47_1", "slurm_47_2")]
    for unfinished in (logs / "slurm_47_1", logs / "slurm_47_2"):
        (unfinished / "result.json").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folders = [
        fit([*options, "--trainer.max_epochs=1"]).best.parents[1] for options in (*rates, rates[0])
    ]
    assert folders == [logs / name for name in ("slurm_47_2", "slurm_47_1", "slurm_47")]
    assert [len(curves(run)["val/acc"]) for run in folders] == [1, 1, 1], "nothing is trained again"
    other = fit([*SMALL, "--model.lr=0.003", "--trainer.max_epochs=1"]).best.parents[1]
    assert other == logs / "slurm_47_3", "no run of this job has this configuration"
    with pytest.raises(UserError, match="would be undone by the checkpoint"), untouched(logs):
        fit([f"--resume={other}", "--trainer.max_epochs=2", "--model.lr=0.5"])
