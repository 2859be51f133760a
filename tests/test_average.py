"""The average of the weights, step by step; everything but the training uses it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RUN, TINY, curves, once, quiet_trainer, run_fit, untouched
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from timm.utils import ModelEmaV3
from torch import nn

from cifar_transfer import BackboneFreeze, Classifier, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export
from cifar_transfer.commands.fit import fit
from cifar_transfer.training.checkpoint_file import RAW_STATE_KEY, STEPS_KEY

DECAY = 0.7  # reached by the warm-up at the seventh step
JOB = [*TINY, f"--model.ema={DECAY}", "--freeze.unfreeze_epoch=1", "--trainer.max_epochs=3"]
BEST, LAST, RAW = (f"{RUN}/checkpoints/{name}.ckpt" for name in ("best", "last", "raw"))


def copy(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def reference(steps, decay):
    """The average of the weights after each step."""
    for number, weights in enumerate(steps):
        kept = min(decay, 1 - (1 + number) ** (-2 / 3)) if number else 0
        if not number:
            average = dict(weights)
        for name, value in weights.items():
            average[name] = (
                average[name].lerp(value, 1 - kept) if value.is_floating_point() else value
            )
    return average


class Witness(Callback):
    """Keeps the weights of each step, and those that are validated and trained on; may fail."""

    def __init__(self, fail=False):
        self.steps, self.shown, self.trained, self.fail = [], [], [], fail

    def on_fit_start(self, trainer, module):
        self.timm = ModelEmaV3(module.network, decay=DECAY, use_warmup=True)

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.steps):
            self.steps.append(copy(module))
            self.timm.update(module.network, step=trainer.global_step)

    def on_validation_batch_end(self, trainer, module, *_):
        if not trainer.sanity_checking:
            self.shown.append((copy(module), reference(self.steps, DECAY)))
            if self.fail:
                raise ZeroDivisionError("in a validation")

    def on_validation_end(self, trainer, module):
        if self.steps:
            self.trained.append(same(copy(module), self.steps[-1]))


def train(
    *callbacks,
    backbone="shufflenet_v2_x0_5",
    epochs=3,
    change=lambda model: None,
    more=None,
    **trainer,
):
    seed_everything(0)
    data = ShapesDataModule(train_images=170, test_images=40, batch_size=32)
    model = TransferClassifier(
        backbone, "none", class_names=data.class_names, ema=DECAY, **more or {}
    )
    change(model)
    freeze = BackboneFreeze(unfreeze_epoch=1)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[*callbacks, freeze], **trainer)
    trainer.fit(model, data)
    return model, trainer


def tie(model):
    model.network.twin = model.network.fc


CASES = {
    "plain": {},
    "two batches a step": {"accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "compiled": {"more": {"compile": True}, "backbone": "lenet5"},
    "growing images": {"more": {"train_sizes": [16, 32], "image_size": 32}},
    "shared weights": {"change": tie},
    "validated twice an epoch": {"val_check_interval": 0.5},
    "no validation at the end": {"check_val_every_n_epoch": 2},
}
RARER = ("bf16-mixed", "growing images", "shared weights", "no validation at the end")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.whole] * (case in RARER)) for case in CASES],
)
def test_it_is_that_of_ten_lines_and_of_timm_from_its_first_step_on(tmp_path, monkeypatch, case):
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: compile(module, backend="eager")
    )  # inductor takes minutes
    witness = Witness()
    model, trainer = train(witness, default_root_dir=tmp_path, **CASES[case])
    assert len(witness.steps) == trainer.global_step == (9 if "two" in case else 15)
    assert witness.shown
    assert all(same(shown, expected) for shown, expected in witness.shown), (
        "the average is validated"
    )
    assert all(witness.trained), "and the training goes on from the weights as they were"
    average = reference(witness.steps, DECAY)
    assert same(copy(model), average), "and the module has it in the end"
    if case != "shared weights":  # which timm averages twice a step
        assert same(copy(model.network), copy(witness.timm.module))
    assert not same(average, witness.steps[-1])
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    saved = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert same(saved["state_dict"], average)
    assert same(saved[RAW_STATE_KEY], witness.steps[-1]), "although the training is over"
    assert saved[STEPS_KEY] == len(witness.steps)


def test_a_frozen_backbone_is_its_own_average_to_the_bit():
    witness = Witness()
    train(witness, epochs=1, default_root_dir=os.devnull)
    (shown, _), last = witness.shown[-1], witness.steps[-1]
    differ = [name for name in shown if not torch.equal(shown[name], last[name])]
    assert differ == ["classifier.network.fc.weight", "classifier.network.fc.bias"]


def test_what_is_saved_within_a_validation_or_with_weights_only_has_the_average_in_its_place(
    tmp_path,
):
    class Saves(Callback):
        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "w.ckpt")

        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "only.ckpt", weights_only=True)

    witness = Witness(fail=True)
    with pytest.raises(ZeroDivisionError, match=r"^in a validation$"):
        train(Saves(), witness, epochs=1, default_root_dir=tmp_path)
    average = reference(witness.steps, DECAY)
    within, only = (
        torch.load(tmp_path / name, weights_only=True) for name in ("w.ckpt", "only.ckpt")
    )
    assert same(within["state_dict"], average)
    assert same(within[RAW_STATE_KEY], witness.steps[-1])
    assert same(only["state_dict"], average), "of the step that has just been made"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return once(tmp_path_factory, "averaged", lambda folder: run_fit(folder, *JOB))


@pytest.mark.slow
def test_every_use_of_a_checkpoint_is_of_the_average(tmp_path, monkeypatch, undisturbed):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed / "lightning_logs", "lightning_logs")
    result = json.loads(Path(RUN, "result.json").read_text())
    for split in ("val", "test"):
        assert (
            result[f"best/{split}_acc"]
            == evaluate(BEST, split, accelerator="cpu", figures=False)[f"{split}/acc"]
        )
    checkpoint = torch.load(LAST, weights_only=True)
    torch.save(checkpoint | {"state_dict": checkpoint[RAW_STATE_KEY]}, RAW)
    shown = curves(RUN)["val/loss"][-1][1]
    losses = {
        name: evaluate(name, "val", accelerator="cpu", figures=False)["val/loss"]
        for name in (LAST, RAW)
    }
    assert losses[LAST] == pytest.approx(shown, rel=1e-5)
    assert losses[RAW] != pytest.approx(shown, rel=1e-3)
    export(LAST, "state_dict")
    exported = torch.load(Path(LAST).with_suffix(".pth"), weights_only=True)
    assert same(exported, copy(Classifier.load(LAST, "cpu").model.network))
    other = TransferClassifier("shufflenet_v2_x0_5", LAST, num_classes=10)
    for used in (exported, copy(other.network)):
        assert same(
            {f"classifier.network.{name}": value for name, value in used.items()},
            checkpoint["state_dict"],
        )


def assert_same_run(one, other):
    states = [torch.load(folder / LAST, weights_only=True) for folder in (one, other)]
    for key in ("state_dict", RAW_STATE_KEY):
        assert same(*(state[key] for state in states)), key
    assert states[0][STEPS_KEY] == states[1][STEPS_KEY]
    scores = [
        [sorted(curves(folder / RUN)[tag]) for tag in ("val/loss", "train/loss_epoch")]
        for folder in (one, other)
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("training_step", 3),
        pytest.param("training_step", 8, marks=pytest.mark.whole),
        pytest.param("training_step", 6, marks=pytest.mark.whole),
        ("validation_step", 2),
    ],
    ids=["frozen", "amid an epoch", "at its end", "in validation"],
)
def test_stopped_and_resumed_it_is_that_of_a_run_never_stopped(
    tmp_path, monkeypatch, undisturbed, where, number
):
    monkeypatch.chdir(tmp_path)
    step, left = getattr(TransferClassifier, where), number

    def stop(self, *args):
        nonlocal left
        left -= (counts := not self.trainer.sanity_checking)
        if counts and left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(TransferClassifier, where, stop)
    with pytest.raises(SystemExit, match="143"):
        fit(JOB)
    assert torch.load(LAST, weights_only=True)[STEPS_KEY] == (
        12 if where == "validation_step" else number
    )
    fit([f"--resume={RUN}"])
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_and_resumed_it_is_that_of_a_run_never_killed(tmp_path, undisturbed):
    options = JOB
    for moment, number in (("mid-step", 8), ("validation", 1), ("moving last.ckpt", 1)):
        run_fit(tmp_path, moment, number, *options, module="killed_job", expect=-signal.SIGKILL)
        options = [f"--resume={RUN}"]
    run_fit(tmp_path, *options)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.whole
def test_two_processes_have_the_same_average(tmp_path):
    """Batch-norm's statistics too, although each process has seen other images."""
    subprocess.run(
        [sys.executable, __file__, tmp_path], check=True, timeout=240, stdin=subprocess.DEVNULL
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not same(ranks[0]["steps"][-1], ranks[1]["steps"][-1]), (
        "their raw statistics differ, as always under DDP"
    )
    assert same(ranks[0]["end"], ranks[1]["end"])
    assert same(ranks[0]["end"], reference(ranks[0]["steps"], DECAY))
    assert not same(ranks[0]["steps"][0], ranks[0]["end"])


@pytest.mark.parametrize("ema", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(ema):
    with pytest.raises(UserError, match=r"ema is .*: take a decay in \[0, 1\), or null"):
        TransferClassifier("lenet5", "none", ema=ema)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"callbacks": [EMAWeightAveraging()]},
            "ema=0.7 and EMAWeightAveraging both average the weights",
        ),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, "and StochasticWeightAveraging both"),
        ({"precision": "bf16-true"}, "not those of SingleDeviceStrategy and precision=bf16-true"),
    ],
)
def test_what_it_cannot_be_with_is_refused(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        train(*options.pop("callbacks", ()), epochs=1, default_root_dir=tmp_path, **options)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["0.8", "null"])
def test_another_average_on_resuming_is_refused(tmp_path, monkeypatch, undisturbed, decay):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed / "lightning_logs", "lightning_logs")
    with (
        untouched(tmp_path),
        pytest.raises(UserError, match=r"model\.ema=.* differs from 0\.7"),
    ):
        fit([f"--resume={RUN}", f"--model.ema={decay}", "--trainer.max_epochs=4"])


@pytest.mark.slow
def test_a_run_without_an_average_is_continued_without(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "lightning_logs", "lightning_logs")
    with untouched(tmp_path), pytest.raises(UserError, match=r"^model.ema=0.7 differs from null"):
        fit([f"--resume={RUN}", "--model.ema=0.7", "--trainer.max_epochs=2"])


def test_a_checkpoint_that_has_lost_its_average_is_refused(tmp_path):
    model, trainer = train(Witness(), epochs=1, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    checkpoint = torch.load(tmp_path / "w.ckpt", weights_only=True)
    del checkpoint[STEPS_KEY]
    torch.save(checkpoint, tmp_path / "w.ckpt")
    data = ShapesDataModule(train_images=170, test_images=40, batch_size=32)
    again = quiet_trainer(max_epochs=2, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=r"^ema=0.7 finds no average in the checkpoint"):
        again.fit(model, data, ckpt_path=tmp_path / "w.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    witness = Witness()
    options = {
        "accelerator": "cpu",
        "devices": 2,
        "check_val_every_n_epoch": 2,
        "default_root_dir": sys.argv[1],
    }
    model, trainer = train(witness, **options)
    torch.save(
        {"steps": witness.steps, "end": copy(model)}, Path(sys.argv[1], f"{trainer.global_rank}.pt")
    )
