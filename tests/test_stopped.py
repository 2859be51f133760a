"""Runs that are told to stop, by a user or a scheduler, save the step and continue from it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import TINY, assert_same_weights, curves, quiet_trainer, run_fit
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from cifar_transfer import ShapesDataModule, TransferClassifier
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.training.interrupt import Interrupt

RUN = "lightning_logs/version_0"
LAST = "checkpoints/last.ckpt"
COMMAND = [sys.executable, "-m", "cifar_transfer.fit"]
JOB = [*TINY, "--freeze.unfreeze_epoch=1", "--trainer.log_every_n_steps=1"]


def told(folder, line, number, *options, delay=0.0, env=None):
    """Start a run, and send it a signal when it has printed a line; yield it, then its end."""
    with subprocess.Popen(
        [*COMMAND, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        assert any(line in printed for printed in process.stdout), f"{line!r} was never printed"
        time.sleep(delay)
        process.send_signal(number)
        yield process
        output = process.stdout.read()
        watchdog.cancel()
    yield process.returncode, output


def stopped(*args, **kwargs):
    *_, result = told(*args, **kwargs)
    return result


@pytest.mark.whole
def test_of_two_processes_one_is_told_and_both_save_the_same_step(tmp_path):
    """89 images a process in batches of 2, without the single last one: 44 steps an epoch."""
    job = [*JOB, "--trainer.devices=2", "--trainer.max_epochs=3", "--data.batch_size=2"]
    status, output = stopped(tmp_path, "  1/3  ", signal.SIGTERM, *job)
    assert status == 128 + signal.SIGTERM, output
    assert output.count(f"Continue with: python -m cifar_transfer fit --resume {RUN}") == 1
    assert "Traceback" not in output
    state = torch.load(tmp_path / RUN / LAST, weights_only=True)
    assert state["epoch"] == 1
    assert state["global_step"] % 10 == 4, "ten, twenty, ... steps after the first epoch's 44"
    counted = state["epoch_so_far"]["train"]["train_acc"]
    images = counted["tp"] + counted["fn"]
    assert images == 4 * (state["global_step"] - 44), "what both have seen of this epoch"
    assert "test accuracy" in run_fit(tmp_path, f"--resume={RUN}", "--report.figures=true").stdout
    steps = [step for step, _ in curves(tmp_path / RUN)["train/loss"]]
    assert steps == list(range(132)), "every step once"
    path = tmp_path / RUN / "figures" / "predictions-test.npz"
    of_two = Predictions.load(path)
    scores = evaluate(str(tmp_path / RUN / "checkpoints" / "best.ckpt"), accelerator="cpu")
    result = json.loads((tmp_path / RUN / "result.json").read_text())
    assert scores["test/acc"] == result["best/test_acc"]
    of_one = Predictions.load(path)
    for name in ("labels", "predicted", "rows"):
        same = torch.equal(getattr(of_two, name), getattr(of_one, name))
        assert same, "in the order of the images"


@pytest.mark.whole
@pytest.mark.parametrize(
    ("number", "delay"), [(signal.SIGTERM, 1), (signal.SIGTERM, 0), (signal.SIGINT, 1)]
)
def test_told_to_stop_after_the_training_ends_with_the_signals_status(tmp_path, number, delay):
    """It is saved; the final test has begun a second later."""
    job = [*JOB, "--trainer.max_epochs=1", "--data.test_images=4000", "--data.eval_batch_size=1"]
    status, output = stopped(tmp_path, "  1/1  ", number, *job, delay=delay)
    assert status in (128 + number, -number), output
    last_words = {signal.SIGTERM: "Terminated.", signal.SIGINT: "Interrupted."}[number]
    if status > 0:
        assert last_words in output or "Stopped. Continue with" in output
    assert "Traceback" not in output
    done = run_fit(tmp_path, f"--resume={RUN}", "--data.eval_batch_size=256")
    assert "test accuracy" in done.stdout
    assert "  1/1  " not in done.stdout, "nothing is trained again"


@pytest.fixture
def slurm(tmp_path):
    """The environment of a SLURM job, whose `scontrol` writes down what it is asked for."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("srun", ""), ("scontrol", f"echo $@ >> '{tmp_path}/asked'")):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "fit",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        pytest.param([], "version_0", "version_1", marks=pytest.mark.whole),
        (["--run=job"], "job", "job"),
    ],
)
def test_lightning_requeues_a_slurm_job_and_the_run_goes_on_from_there(
    tmp_path, slurm, name, first, second
):
    """With the weights of a run that never was stopped; in its own folder if that has a name."""
    job = [*JOB, "--trainer.max_epochs=4", *name]
    alone = tmp_path / "alone"
    folder = tmp_path / "requeued"
    alone.mkdir()
    folder.mkdir()
    run_fit(alone, *job)
    requeued = told(folder, "  2/4  ", signal.SIGUSR1, *job, env=slurm)
    process = next(requeued)
    lines = (line for line in process.stdout if "  3/4  " in line)
    assert next(lines), "the scheduler stops it a moment later"
    process.send_signal(signal.SIGTERM)
    status, output = next(requeued)
    assert status == 128 + signal.SIGTERM, output
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    again = subprocess.run(
        [*COMMAND, *job], cwd=folder, env=slurm, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert "  2/4  " not in again.stdout
    run = folder / "lightning_logs" / second
    assert "outside of its run" not in again.stderr, "the record of the splits is found"
    assert_same_weights(run / LAST, alone / "lightning_logs" / first / LAST)
    result = json.loads((run / "result.json").read_text())
    accuracies = [accuracy for _, accuracy in curves(run)["val/acc"]]
    assert result["best/val_acc"] == pytest.approx(max(accuracies))
    if name:
        assert len(accuracies) == 4
        third = subprocess.run(
            [*COMMAND, *job], cwd=folder, env=slurm, capture_output=True, text=True, timeout=300
        )
        assert third.returncode == 2
        assert "is there already" in third.stderr, "the run is finished"


def test_lightning_requeues_after_the_step(tmp_path, monkeypatch):
    """By itself it would save between the optimizer's first parameter and its last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    requeued_within_step = []

    class Witness(Callback):
        inside = False

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.inside = True
            os.kill(os.getpid(), signal.SIGUSR1)

        def on_train_batch_end(self, *_):
            self.inside = False

    witness = Witness()
    before = signal.signal(signal.SIGUSR1, lambda *_: requeued_within_step.append(witness.inside))
    data = ShapesDataModule(train_images=100, test_images=50, batch_size=30)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    try:
        quiet_trainer(max_epochs=1, callbacks=[witness, Interrupt(None)]).fit(model, data)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert requeued_within_step == [False] * 3, "once a step, after it, the last at the end"
