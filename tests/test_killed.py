"""Runs that are killed with SIGKILL again and again end like one that never was."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
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
    """Return the run that can be continued.

    One that was killed before it had written its options has left an empty folder.
    """
    found = list((folder / "lightning_logs").glob("*/config.yaml"))
    assert len(found) <= 1
    return found[0].parent if found else None


def killed(folder, moment, number, options, chance):
    """Start the run, or continue it, and see it die."""
    run = run_of(folder)
    resume = [f"--resume={run}"] if run else options
    if moment == "any":
        moment, number = (
            chance.choice(("mid-step", "validation", "moving last.ckpt")),
            chance.randint(1, 3),
        )
    run_fit(folder, moment, number, *resume, module="killed_job", expect=-signal.SIGKILL)
    for path in folder.rglob("*.ckpt"):
        assert "state_dict" in torch.load(path, "cpu", weights_only=True), (
            "whole, whatever happened"
        )


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
    options += [
        f"--trainer.max_epochs={epochs}",
        "--freeze.unfreeze_epoch=2",
        "--trainer.log_every_n_steps=1",
    ]
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    for one in (undisturbed, folder):
        for split, count in (("train", 60), ("test", 20)):
            write_images(one / "photos" / split, count, classes=("cat", "dog", "fox"), seed=count)
    whole = run_fit(undisturbed, *options).stdout
    chance = random.Random(0)
    for moment, number in moments:
        killed(folder, moment, number, options, chance)
    run, expected = run_of(folder), undisturbed / RUN
    done = run_fit(folder, f"--resume={run}").stdout
    assert done.splitlines()[-9:-6] == whole.splitlines()[-9:-6], (
        "the same accuracies and best epoch"
    )
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_weights(run / "checkpoints" / name, expected / "checkpoints" / name)
    schedules = [
        torch.load(one / "checkpoints/last.ckpt", weights_only=True)["lr_schedulers"]
        for one in (run, expected)
    ]
    assert schedules[0] == schedules[1], "the step of the last epoch before a kill counts"
    assert (run / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    resumed, expected = curves(run), curves(expected)
    assert resumed.keys() == expected.keys()
    for tag, points in resumed.items():
        assert all(a[0] < b[0] for a, b in pairwise(points)), f"{tag} overlaps: {points}"
        assert points == expected[tag], tag


@pytest.mark.slow
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
            watchdog = threading.Timer(150, first.kill)
            watchdog.start()
            epochs = (line for line in first.stdout if "/60  " in line)
            assert next(epochs) < next(epochs), "the first has its checkpoint"
            (second,) = children(first.pid)
            began = time.monotonic()
            os.kill(first.pid if victim == "the first" else second, signal.SIGKILL)
            said = first.stdout.read()  # until the last process has closed it
            watchdog.cancel()
        assert time.monotonic() - began < 60
        assert first.returncode != 0
        assert (
            not Path(f"/proc/{second}/cmdline").exists()
            or not Path(f"/proc/{second}/cmdline").read_bytes()
        )
        told = (
            "Another process of this run is gone",
            "The first process of this run is gone",
            "terminated with code -9",
        )
        assert any(words in said for words in told), said
        assert "Traceback" not in said
        options = [f"--resume={RUN}", "--trainer.max_epochs=60"]
    last = torch.load(tmp_path / LAST, weights_only=True)["epoch"]
    done = run_fit(tmp_path, f"--resume={RUN}", f"--trainer.max_epochs={last + 2}")
    assert "test accuracy" in done.stdout


def children(pid):
    """Processes that this one has started and that run the same module."""
    found = subprocess.run(
        ["pgrep", "-P", str(pid), "-f", "cifar_transfer"], capture_output=True, text=True
    )
    return [int(line) for line in found.stdout.split()]
