"""Runs that are killed with SIGKILL again and again end like one that never was."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_weights, curves, run_fit, write_images

RUN = "lightning_logs/version_0"
LAST = f"{RUN}/checkpoints/last.ckpt"

# What is going on when the process dies, and which time of its kind, in the order of the run. What
# is over when a checkpoint is written does not come again.
SAMPLE = [("mid-step", 4), ("half of last.ckpt", 2), ("unfreezing", 1)]
ALL = [
    ("start-up", 1),
    ("decoding", 1),
    ("writing the configuration", 1),
    ("mid-step", 3),
    ("half of best.ckpt", 1),
    ("half of last.ckpt", 1),
    ("mid-step", 4),
    ("moving last.ckpt", 1),
    ("trimming the curves", 1),
    ("validation", 1),
    ("mid-step", 8),
    ("unfreezing", 1),
    ("any", 0),
    ("half of last.ckpt", 2),
    ("any", 0),
    ("validation", 2),
    ("any", 0),
    ("any", 0),
    ("final test", 1),
    ("writing the result", 1),
]


def run_of(folder):
    """Return the run to continue; one that was killed before it was accepted has no options."""
    configs = list((folder / "lightning_logs").glob("*/config.yaml"))
    assert len(configs) <= 1
    return configs[0].parent if configs else None


def kill(folder, moment, number, options, chance):
    """Start the run, or continue it, and see it die."""
    run = run_of(folder)
    if run is not None:
        options = [f"--resume={run}"]
    if moment == "any":
        moment = chance.choice(("mid-step", "validation", "moving last.ckpt"))
        number = chance.randint(1, 3)
    run_fit(folder, moment, number, *options, module="killed_job", expect=-signal.SIGKILL)
    for path in folder.rglob("*.ckpt"):
        checkpoint = torch.load(path, "cpu", weights_only=True)
        assert "state_dict" in checkpoint, "whole, whatever happened"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "epochs"),
    [
        pytest.param(SAMPLE, 4, id="3 kills"),
        pytest.param(ALL, 24, id="20 kills", marks=pytest.mark.whole),
    ],
)
def test_killed_again_and_again_ends_with_the_weights_of_a_run_that_never_was(
    tmp_path, moments, epochs
):
    options = [option for option in TINY if not option.startswith("--data")]
    options += ["--data=ImageFolderDataModule", "--data.root=photos", "--data.batch_size=32"]
    options += ["--freeze.unfreeze_epoch=2", "--trainer.log_every_n_steps=1"]
    options += [f"--trainer.max_epochs={epochs}"]
    undisturbed = tmp_path / "undisturbed"
    folder = tmp_path / "killed"
    for root in (undisturbed, folder):
        for split, count in (("train", 60), ("test", 20)):
            photos = root / "photos" / split
            write_images(photos, count, classes=("cat", "dog", "fox"), seed=count)
    whole = run_fit(undisturbed, *options).stdout
    chance = random.Random(0)
    for moment, number in moments:
        kill(folder, moment, number, options, chance)
    run = run_of(folder)
    expected = undisturbed / RUN
    done = run_fit(folder, f"--resume={run}").stdout
    scores = [text.splitlines()[-9:-6] for text in (done, whole)]
    assert scores[0] == scores[1], "the same accuracies and best epoch"
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_weights(run / "checkpoints" / name, expected / "checkpoints" / name)
    schedules = [
        torch.load(path / "checkpoints/last.ckpt", weights_only=True)["lr_schedulers"]
        for path in (run, expected)
    ]
    assert schedules[0] == schedules[1], "the step of the last epoch before a kill counts"
    assert (run / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    assert curves(run) == curves(expected)


@pytest.mark.whole
@pytest.mark.parametrize(
    "victims",
    [
        ["the first"],
        pytest.param(["the second", "the first", "the second"], marks=pytest.mark.whole),
    ],
)
def test_one_process_of_two_is_killed(tmp_path, victims):
    """The other one ends too, within a minute, and the run continues."""
    options = [*TINY, "--trainer.devices=2", "--trainer.max_epochs=60", "--freeze.unfreeze_epoch=1"]
    for victim in victims:
        command = [sys.executable, "-m", "cifar_transfer.fit", *options]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as first:
            watchdog = threading.Timer(300, first.kill)
            watchdog.start()
            epochs = (line for line in first.stdout if "/60  " in line)
            assert next(epochs) < next(epochs), "the first has its checkpoint"
            (second,) = children(first.pid)
            began = time.monotonic()
            os.kill(first.pid if victim == "the first" else second, signal.SIGKILL)
            output = first.stdout.read()  # until the last process has closed it
            watchdog.cancel()
        assert time.monotonic() - began < 60
        assert first.returncode != 0
        assert not is_running(second)
        gone = ("Another process of this run is gone", "terminated with code -9")
        assert any(words in output for words in gone), output
        assert "Traceback" not in output
        options = [f"--resume={RUN}", "--trainer.max_epochs=60"]
    last = torch.load(tmp_path / LAST, weights_only=True)["epoch"]
    done = run_fit(tmp_path, f"--resume={RUN}", f"--trainer.max_epochs={last + 2}")
    assert "test accuracy" in done.stdout


def children(pid):
    """Return the processes that this one has started and that run the same module."""
    listed = subprocess.run(
        ["pgrep", "-P", str(pid), "-f", "cifar_transfer"], capture_output=True, text=True
    )
    return [int(line) for line in listed.stdout.split()]


def is_running(pid):
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False
