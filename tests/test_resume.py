"""Runs that are stopped and continued with `--resume` end with the weights of one that never was."""

import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, assert_same_weights, curves, once, run_fit, weights

from cifar_transfer import TransferClassifier

JOB = [
    *TINY,
    "--trainer.max_epochs=4",
    "--freeze.unfreeze_epoch=2",
    "--trainer.log_every_n_steps=1",
]
RUN = "lightning_logs/version_0"
LAST = f"{RUN}/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return once(tmp_path_factory, "undisturbed", lambda folder: run_fit(folder, *JOB))


def test_interrupted_within_an_epoch_continues_from_that_step(tmp_path, undisturbed):
    command = [sys.executable, "-m", "cifar_transfer.fit", *JOB]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        assert any("  2/4  " in printed for printed in process.stdout)
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == 130, said
    assert (
        "Stopped. Continue with: python -m cifar_transfer.fit --resume lightning_logs/version_0"
        in said
    )
    assert "Traceback" not in said
    stopped = torch.load(tmp_path / LAST, weights_only=True)
    assert stopped["epoch"] == 2
    assert 12 < stopped["global_step"] < 18, "between the steps of the third epoch"
    done = run_fit(tmp_path, "--resume=lightning_logs/version_0")
    assert "test accuracy" in done.stdout
    assert "Warning" not in done.stderr
    assert_same_weights(tmp_path / LAST, undisturbed / LAST)
    resumed, whole = curves(tmp_path / RUN), curves(undisturbed / RUN)
    assert resumed["train/loss"] == whole["train/loss"], "every image once"
    assert resumed["val/loss"] == whole["val/loss"]
    assert (tmp_path / RUN / "metrics.csv").read_text() == (
        undisturbed / RUN / "metrics.csv"
    ).read_text()


@pytest.mark.whole
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path, undisturbed):
    run_fit(tmp_path, *JOB)
    assert_same_weights(tmp_path / LAST, undisturbed / LAST)
    run_fit(tmp_path, *JOB, "--seed_everything=1", "--trainer.max_epochs=1")
    other = weights(tmp_path / LAST.replace("version_0", "version_1"))
    assert (
        other["classifier.network.conv1.0.weight"]
        != weights(undisturbed / LAST)["classifier.network.conv1.0.weight"]
    ).any()


def test_an_override_that_the_checkpoint_would_undo_is_refused(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "lightning_logs", tmp_path / "lightning_logs")
    before = sorted(
        (path.name, path.stat().st_size)
        for path in (tmp_path / "lightning_logs" / "version_0").rglob("*")
    )
    run = "--resume=lightning_logs/version_0"
    done = run_fit(tmp_path, run, "--trainer.max_epochs=5", "--model.lr=0.5", expect=2)
    assert "model.lr=0.5 would be undone" in done.stderr
    assert "Traceback" not in done.stderr
    after = sorted(
        (path.name, path.stat().st_size)
        for path in (tmp_path / "lightning_logs" / "version_0").rglob("*")
    )
    assert [row for row in after if row[0].endswith(".ckpt")] == [
        row for row in before if row[0].endswith(".ckpt")
    ]
    # What the checkpoint does not fix may change: more epochs.
    run_fit(tmp_path, run, "--trainer.max_epochs=5")
    assert [step for step, _ in curves(tmp_path / RUN)["val/acc"]] == [1, 2, 3, 4, 5]


def test_ckpt_path_continues_in_a_new_run(tmp_path, undisturbed):
    run_fit(tmp_path, *JOB, "--trainer.max_epochs=5", f"--ckpt_path={undisturbed / LAST}")
    assert [step for step, _ in curves(tmp_path / RUN)["val/acc"]] == [5]


def test_words_for_size_and_statistics_mean_on_resuming_what_they_meant(tmp_path):
    """The weights, which said what they mean, are not at hand any more."""
    statistics = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    model = TransferClassifier("shufflenet_v2_x0_5", "none", image_size=48, normalize=statistics)
    first = tmp_path / "first.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, first)
    words = ["--model.image_size=native", "--model.normalize=weights"]
    run_fit(tmp_path, *TINY, *words, f"--model.weights={first}", "--trainer.max_epochs=1")
    first.unlink()
    run = tmp_path / "lightning_logs" / "version_0"
    before = torch.load(run / "checkpoints" / "last.ckpt", "cpu", weights_only=True)
    done = run_fit(tmp_path, "--resume", run, "--trainer.max_epochs=2")
    content = torch.load(run / "checkpoints" / "last.ckpt", "cpu", weights_only=True)
    assert (before["epoch"], content["epoch"]) == (0, 1)
    seconds = [saved["callbacks"]["Report"]["seconds"] for saved in (before, content)]
    shown = float(re.search(r"^ +2/2 .* ([\d.]+) s$", done.stdout, re.MULTILINE)[1])
    assert seconds[1] == pytest.approx(seconds[0] + shown, abs=0.06), "the clock goes on"
    result = (run / "result.json").rename(tmp_path / "result.json").read_text()
    run_fit(tmp_path, "--resume", run)  # as if killed in the final test: no epoch is left to time
    assert (run / "result.json").read_text() == result
    assert content["hyper_parameters"]["image_size"] == 48
    assert content["hyper_parameters"]["normalize"] == statistics
    config = (run / "config.yaml").read_text()
    assert "image_size: native" in config
    assert "normalize: weights" in config
