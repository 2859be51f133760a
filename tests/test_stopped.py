"""Runs that are told to stop, by a user or a scheduler, save the step and continue from it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, assert_same_weights, curves, quiet_trainer, run_fit
from lightning.pytorch.callbacks import Callback

from cifar_transfer import ShapesDataModule, TransferClassifier
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.training import interrupt

RUN = "lightning_logs/version_0"
LAST = "checkpoints/last.ckpt"
COMMAND = [sys.executable, "-m", "cifar_transfer.fit"]
JOB = [*TINY, "--freeze.unfreeze_epoch=1", "--trainer.log_every_n_steps=1"]


def told(folder, line, number, *options, delay=0.0, env=None):
    """Start a run, and send it a signal when it has printed that line; the status and what it said then."""
    with subprocess.Popen(
        [*COMMAND, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as process:
        watchdog = threading.Timer(150, process.kill)
        watchdog.start()
        assert any(line in printed for printed in process.stdout), f"{line!r} was never printed"
        time.sleep(delay)
        process.send_signal(number)
        yield process
        said = process.stdout.read()
        watchdog.cancel()
    yield process.returncode, said


def stopped(*args, **kwargs):
    *_, result = told(*args, **kwargs)
    return result


@pytest.mark.slow
def test_of_two_processes_one_is_told_and_both_save_the_same_step(tmp_path):
    """89 images a process in batches of 2, without the single last one: 44 steps an epoch."""
    job = [*JOB, "--trainer.devices=2", "--trainer.max_epochs=3", "--data.batch_size=2"]
    status, said = stopped(tmp_path, "  1/3  ", signal.SIGTERM, *job)
    assert status == 128 + signal.SIGTERM, said
    assert said.count(f"Stopped. Continue with: python -m cifar_transfer.fit --resume {RUN}") == 1
    assert "Traceback" not in said
    state = torch.load(tmp_path / RUN / LAST, weights_only=True)
    assert state["epoch"] == 1
    assert state["global_step"] % 10 == 4, "ten, twenty, ... steps after the first epoch's 44"
    counted = state["epoch_so_far"]["train"]["train_acc"]
    assert counted["tp"] + counted["fn"] == 4 * (state["global_step"] - 44), (
        "what both have seen of this epoch"
    )
    assert "test accuracy" in run_fit(tmp_path, f"--resume={RUN}", "--report.figures=true").stdout
    assert [step for step, _ in curves(tmp_path / RUN)["train/loss"]] == list(range(132)), (
        "every step once"
    )
    kept = tmp_path / RUN / "figures" / "predictions-test.npz"
    of_two = Predictions.load(kept)
    scores = evaluate(str(tmp_path / RUN / "checkpoints" / "best.ckpt"), accelerator="cpu")
    assert (
        scores["test/acc"]
        == json.loads((tmp_path / RUN / "result.json").read_text())["best/test_acc"]
    )
    of_one = Predictions.load(kept)
    for name in ("labels", "predicted", "rows"):
        assert torch.equal(getattr(of_two, name), getattr(of_one, name)), (
            "in the order of the images"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "delay"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.whole),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.whole),
    ],
)
def test_told_to_stop_after_the_training_ends_with_the_signals_status(tmp_path, number, delay):
    """It is saved; the final test has begun a second later."""
    job = [*JOB, "--trainer.max_epochs=1", "--data.test_images=4000", "--data.eval_batch_size=1"]
    status, said = stopped(tmp_path, "`Trainer.fit` stopped", number, *job, delay=delay)
    assert status in (128 + number, -number), said
    words = (
        {signal.SIGTERM: "Terminated.", signal.SIGINT: "Interrupted."}[number],
        "Stopped. Continue with",
    )
    assert status < 0 or any(word in said for word in words)
    assert "Traceback" not in said
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
        "JOB_ID": "4711",
        "JOB_NAME": "fit",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | {f"SLURM_{name}": value for name, value in job.items()}


@pytest.mark.slow
def test_slurm_requeues_the_job_and_the_run_continues_in_its_folder(tmp_path, slurm):
    job = [*JOB, "--trainer.max_epochs=4"]
    alone, here = tmp_path / "alone", tmp_path / "here"
    alone.mkdir()
    here.mkdir()
    run_fit(alone, *job)
    requeued = told(here, "  2/4  ", signal.SIGUSR1, *job, env=slurm)
    process = next(requeued)
    assert any("  3/4  " in line for line in process.stdout), (
        "the scheduler will stop it, and does a moment later"
    )
    process.send_signal(signal.SIGTERM)
    status, said = next(requeued)
    assert status == 128 + signal.SIGTERM, said
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    run = here / "lightning_logs" / "slurm_4711"
    assert not list(here.rglob("hpc_ckpt_*")), "which Lightning would prefer to a newer checkpoint"
    restarted = slurm | {"SLURM_RESTART_COUNT": "1"}
    again = subprocess.run(
        [*COMMAND, *job], cwd=here, env=restarted, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert "  2/4  " not in again.stdout
    assert [path.name for path in (here / "lightning_logs").iterdir()] == ["slurm_4711"]
    assert_same_weights(run / LAST, alone / RUN / LAST)
    assert curves(run)["train/loss"] == curves(alone / RUN)["train/loss"]


def test_lightnings_requeueing_waits_for_the_end_of_the_step(tmp_path, monkeypatch):
    """By itself it would save between the optimizer's first parameter and its last."""
    monkeypatch.chdir(tmp_path)
    seen = []

    class Witness(Callback):
        inside = False

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.inside = True
            os.kill(os.getpid(), signal.SIGUSR1)

        def on_train_batch_end(self, *_):
            self.inside = False

    witness = Witness()
    monkeypatch.setattr(interrupt, "SLURMEnvironment", type("Slurm", (), {"detect": lambda: True}))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(
        interrupt.subprocess,
        "run",
        lambda *_, **__: seen.append(witness.inside) or Mock(returncode=0),
    )
    before = signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("Lightning's handler was called"))
    data = ShapesDataModule(train_images=100, test_images=50, batch_size=30)
    try:
        quiet_trainer(
            max_epochs=1,
            callbacks=[witness, interrupt.Interrupt(None)],
        ).fit(TransferClassifier("lenet5", "none", class_names=data.class_names), data)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [False] * 3, "once a step, after it, the last when training ends"
