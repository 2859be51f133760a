"""Runs that are stopped and continued end with the weights of one that never was."""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY, assert_same_weights, curves, once, quiet_trainer, run_fit, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from cifar_transfer import ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError

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


@pytest.mark.slow
def test_interrupted_within_an_epoch_continues_from_that_step(tmp_path, undisturbed):
    """Its third epoch has the steps 13 to 18."""
    done = run_fit(tmp_path, "Ctrl-C", 15, *JOB, module="killed_job", expect=130)
    assert "Stopping after this step (SIGINT; again: at once) ..." in done.stdout
    assert f"Stopped. Continue with: python -m cifar_transfer fit --resume {RUN}" in done.stdout
    assert "Traceback" not in done.stderr
    stopped = torch.load(tmp_path / LAST, weights_only=True)
    assert (stopped["epoch"], stopped["global_step"]) == (2, 15)
    done = run_fit(tmp_path, f"--resume={RUN}")
    assert "test accuracy" in done.stdout
    assert "Warning" not in done.stderr
    assert_same_weights(tmp_path / LAST, undisturbed / LAST)
    assert curves(tmp_path / RUN) == curves(undisturbed / RUN), "every step and epoch once"
    metrics = [(folder / RUN / "metrics.csv").read_text() for folder in (tmp_path, undisturbed)]
    assert metrics[0] == metrics[1]


@pytest.mark.whole
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path, undisturbed):
    run_fit(tmp_path, *JOB)
    assert_same_weights(tmp_path / LAST, undisturbed / LAST)
    run_fit(tmp_path, *JOB, "--seed_everything=1", "--trainer.max_epochs=1")
    name = "classifier.network.conv1.0.weight"
    other = weights(tmp_path / LAST.replace("version_0", "version_1"))[name]
    assert (other != weights(undisturbed / LAST)[name]).any()


@pytest.mark.slow
def test_a_changed_option_is_refused_and_more_epochs_are_trained(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "lightning_logs", tmp_path / "lightning_logs")
    resume = [f"--resume={RUN}", "--trainer.max_epochs=5"]
    done = run_fit(tmp_path, *resume, "--model.lr=0.5", expect=2)
    assert "model.lr=0.5 differs from 0.001" in done.stderr
    assert "Traceback" not in done.stderr
    run_fit(tmp_path, *resume)
    assert [step for step, _ in curves(tmp_path / RUN)["val/acc"]] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_ckpt_path_continues_in_a_new_run(tmp_path, undisturbed):
    run_fit(tmp_path, *JOB, "--trainer.max_epochs=5", f"--ckpt_path={undisturbed / LAST}")
    assert [step for step, _ in curves(tmp_path / RUN)["val/acc"]] == [5]


@pytest.fixture(scope="module")
def from_python(tmp_path_factory):
    """A checkpoint of an epoch that is over."""
    folder = tmp_path_factory.mktemp("python")
    keep = ModelCheckpoint(folder, "last")
    quiet_trainer(max_epochs=1, callbacks=[keep]).fit(*lenet())
    return folder / "last.ckpt"


def lenet(model=None, data=None):
    data = ShapesDataModule(train_images=40, test_images=10, **{"batch_size": 12} | (data or {}))
    return TransferClassifier("lenet5", "none", num_classes=10, **model or {}), data


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ({"lr": 0.5}, {}, r"model\.lr=0\.5 differs from 0\.001, with which the run began"),
        ({"schedule": "cosine"}, {}, r"model\.schedule=cosine differs from plateau"),
        ({"mixup_alpha": 0.2}, {}, r"model\.mixup_alpha=0\.2 differs from 0\.0"),
        ({}, {"batch_size": 8}, r"data\.batch_size=8 differs from 12"),
        ({}, {"seed": 3}, "seed_everything=3 differs from 0"),
    ],
)
def test_python_is_refused_changed_options_too(from_python, model, data, words):
    with pytest.raises(UserError, match=words):
        quiet_trainer(max_epochs=2).fit(*lenet(model, data), ckpt_path=from_python)


def test_python_may_change_what_makes_no_other_run(from_python):
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(*lenet({"compile": False}, {"eval_batch_size": 5}), ckpt_path=from_python)
    assert trainer.current_epoch == 2


def test_weights_alone_are_no_run_to_continue(tmp_path, from_python):
    checkpoint = torch.load(from_python, weights_only=True)
    del checkpoint["loops"]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="holds weights alone, and no run to continue"):
        quiet_trainer(max_epochs=2).fit(*lenet(), ckpt_path=tmp_path / "weights.ckpt")


@pytest.mark.whole
def test_words_for_size_and_statistics_mean_on_resuming_what_they_meant(tmp_path):
    """The weights, which said what they mean, are not at hand any more."""
    statistics = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    options = ["--model.image_size=48", f"--model.normalize={statistics}"]
    run_fit(tmp_path, *TINY, *options, "--trainer.max_epochs=1")
    first = (tmp_path / LAST).rename(tmp_path / "first.ckpt")
    shutil.rmtree(tmp_path / "lightning_logs")
    options = ["--model.image_size=native", "--model.normalize=weights", f"--model.weights={first}"]
    run_fit(tmp_path, *TINY, *options, "--trainer.max_epochs=1")
    first.unlink()
    run = tmp_path / RUN
    before = torch.load(run / "checkpoints" / "last.ckpt", "cpu", weights_only=True)
    done = run_fit(tmp_path, "--resume", run, "--trainer.max_epochs=2")
    content = torch.load(run / "checkpoints" / "last.ckpt", "cpu", weights_only=True)
    assert (before["epoch"], content["epoch"]) == (0, 1)
    seconds = [saved["callbacks"]["Report"]["seconds"] for saved in (before, content)]
    shown = float(re.search(r"^ +2/2 .* ([\d.]+) s$", done.stdout, re.MULTILINE)[1])
    assert seconds[1] == pytest.approx(seconds[0] + shown, abs=0.06), "the clock goes on"
    result = json.loads((run / "result.json").rename(tmp_path / "result.json").read_text())
    run_fit(tmp_path, "--resume", run)  # as if killed in the final test: no epoch is left to time
    result_again = json.loads((run / "result.json").read_text())
    assert result.pop("command") != result_again.pop("command")
    assert result == result_again
    geometry = content["network"]["geometry"]
    assert geometry["input_side"] == 48
    assert [geometry["mean"], geometry["std"]] == statistics
    assert content["hyper_parameters"]["image_size"] == "native", "as given"
    assert content["hyper_parameters"]["normalize"] == "weights"
