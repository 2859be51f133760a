"""The scores of a run are those of `best.ckpt`, however it was validated, stopped and resumed."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import RUN, assert_same_weights, curves, quiet_trainer

from cifar_transfer import Classifier, ShapesDataModule, TransferClassifier
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.fit import fit
from cifar_transfer.training.checkpoint_file import read_checkpoint
from cifar_transfer.training.evaluation import load_data

IMAGES = 184  # of training: six batches, the last one smaller
JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--model.lr=0.003",
    "--model.lr_patience=0",
    "--data=ShapesDataModule",
    "--data.train_images=270",
    "--data.val_fraction=0.334",
    "--data.test_images=70",
    "--data.batch_size=32",
    "--data.eval_batch_size=24",
    "--freeze.unfreeze_epoch=0",
    "--report.figures=false",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
]
BATCH_NORM = ["--model.backbone=shufflenet_v2_x0_5", "--trainer.max_epochs=3"]


def callback(name, **options):
    return f"--trainer.callbacks={json.dumps([{'class_path': name, 'init_args': options}])}"


NEVER = {
    "a validation after five of four epochs": [
        "--trainer.max_epochs=4",
        "--trainer.check_val_every_n_epoch=5",
    ],
    "max_steps before a validation": ["--trainer.max_steps=4"],
}
CASES = NEVER | {
    "every epoch": [],
    "half an epoch": ["--trainer.val_check_interval=0.5"],
    "4 of 6 batches": ["--trainer.val_check_interval=4"],
    "every other epoch": ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"],
    "max_steps": ["--trainer.max_steps=8"],
    "max_time": ["--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:01"],
    "EarlyStopping": [
        *("--trainer.max_epochs=5", "--trainer.val_check_interval=0.5"),
        callback("EarlyStopping", monitor="val/acc", mode="max", patience=0),
    ],
    "EMA": [*BATCH_NORM, callback("EMAWeightAveraging", decay=0.8)],
    "EMA, twice an epoch": [
        *BATCH_NORM,
        "--trainer.val_check_interval=0.5",
        callback("EMAWeightAveraging", decay=0.8),
    ],
    "SWA": [*BATCH_NORM, callback("StochasticWeightAveraging", swa_lrs=0.01)],
    "some validation images": ["--trainer.limit_val_batches=2"],
}

MARKS = {
    "EMA": pytest.mark.slow,
    "EMA, twice an epoch": pytest.mark.whole,
    "SWA": pytest.mark.whole,
}


def predicted(best, split):
    """The accuracy of a checkpoint, from what `Classifier` says to each image."""
    data = load_data(read_checkpoint(best))
    data.setup()
    images = data.images[split]
    pixels, labels = images.__getitems__(range(len(images)))
    likeliest = Classifier.load(best, "cpu").predict(list(pixels), top_k=1)
    right = [
        names[0][0] == data.class_names[label]
        for names, label in zip(likeliest, labels, strict=True)
    ]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=MARKS.get(case, ())) for case in CASES],
)
def test_the_scores_of_a_run_are_those_of_its_best_checkpoint(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    outcome = fit([*JOB, *CASES[case]])
    assert outcome.best == Path(RUN, "checkpoints/best.ckpt")
    said = capsys.readouterr().out
    result = json.loads(Path(RUN, "result.json").read_text())
    for split in ("val", "test"):
        score = result[f"best/{split}_acc"]
        assert score == outcome.scores[f"best/{split}_acc"]
        assert (
            score
            == evaluate(str(outcome.best), split, accelerator="cpu", figures=False)[f"{split}/acc"]
        )
        assert score == pytest.approx(predicted(outcome.best, split), abs=1e-6)
        assert f"{split} accuracy{' ' * (split == 'val')}  {score:.2%}\n" in said
    last = torch.load(Path(RUN, "checkpoints/last.ckpt"), weights_only=True)["callbacks"]
    (best,) = (
        state
        for name, state in last.items()
        if name.startswith("RunCheckpoint") and "val/acc" in name
    )
    assert (
        ("No validation took place" in said)
        == (case in NEVER)
        == (best["best_model_score"] is None)
    )
    if case not in NEVER and case != "some validation images":
        assert best["best_model_score"] == result["best/val_acc"], (
            "the weights saved are those validated"
        )


def test_an_epoch_without_validation_shows_none_and_steps_no_plateau(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit([*JOB, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "/3  " in line]
    assert [line.count("%") for line in lines] == [1, 2, 1]
    assert len({line.index(" s") for line in lines}) == 1, "a column stays where it is"
    logged = curves(RUN)
    assert (
        [epoch for epoch, _ in logged["val/acc"]]
        == [epoch for epoch, _ in logged["val/loss"]]
        == [2]
    )
    assert [epoch for epoch, _ in logged["train/acc"]] == [1, 2, 3]
    last = torch.load(Path(RUN, "checkpoints/last.ckpt"), weights_only=True)
    assert last["lr_schedulers"][0]["last_epoch"] == 1, "one validation, one step"


@pytest.fixture
def steps(monkeypatch):
    """Epoch, number and images of every step of training; `steps.stop_at` is told to stop in."""

    class Steps(list):
        stop_at = None

    seen, step = Steps(), TransferClassifier.training_step

    def witness(self, batch, batch_idx):
        seen.append((self.current_epoch, batch_idx, float(batch[0].sum())))
        if len(seen) == seen.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TransferClassifier, "training_step", witness)
    return seen


def state(run):
    """What a run has come to, but for times and places."""
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    result = json.loads((run / "result.json").read_text())
    images = last["callbacks"]["Report"]["epoch"]["images"]
    logged = {
        tag: sorted(points) for tag, points in curves(run).items()
    }  # of event files of the same second
    return logged, result["best/val_acc"], result["best/test_acc"], images, last["lr_schedulers"]


INTERVALS = {
    "validation at the end": [],
    "twice an epoch": ["--trainer.val_check_interval=0.5"],
    "after 4 of 6": ["--trainer.val_check_interval=4"],
    "two batches a step": ["--trainer.accumulate_grad_batches=2"],
    "ended by max_steps": [],
    "ended by max_steps, continued to more": [],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "validation at the end",
        pytest.param("twice an epoch", marks=pytest.mark.whole),
        pytest.param("ended by max_steps", marks=pytest.mark.whole),
        pytest.param("after 4 of 6", marks=pytest.mark.whole),
        pytest.param("two batches a step", marks=pytest.mark.whole),
        pytest.param("ended by max_steps, continued to more", marks=pytest.mark.whole),
    ],
)
def test_an_epoch_that_is_stopped_and_resumed_is_that_of_a_run_never_stopped(
    tmp_path, monkeypatch, steps, case
):
    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.chdir(whole)
    fit([*JOB, *INTERVALS[case]])
    expected = state(whole / RUN)
    batches = list(steps)
    assert [step[:2] for step in batches] == [
        (epoch, batch) for epoch in (0, 1) for batch in range(6)
    ]
    assert expected[3] == IMAGES
    # Lightning counts an empty epoch when max_steps=6 ended a run with its epoch and max_steps
    # continues it.
    for stop in (2, 3, 4, 11) if "more" in case else (2, 3, 4, 6, 11):
        folder = tmp_path / f"after {stop}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        steps.clear()
        if "max_steps" in case:
            fit([*JOB, f"--trainer.max_steps={stop}"])
            fit([f"--resume={RUN}", f"--trainer.max_steps={12 if 'more' in case else -1}"])
        else:
            steps.stop_at = stop
            with pytest.raises(SystemExit, match="143"):
                fit([*JOB, *INTERVALS[case]])
            steps.stop_at = None
            fit([f"--resume={RUN}"])
        assert list(steps) == batches
        now = state(folder / RUN)
        if "max_steps" in case:  # its first end was tested too
            now[0]["test/acc"], now[0]["test/loss"] = (
                now[0]["test/acc"][-1:],
                now[0]["test/loss"][-1:],
            )
        assert now == expected
        assert_same_weights(
            folder / RUN / "checkpoints/last.ckpt", whole / RUN / "checkpoints/last.ckpt"
        )


def test_a_mean_loss_is_that_of_all_images_however_they_are_batched(tmp_path):
    """The mean of batches would weigh the one image of the last batch like the six of another."""
    data = ShapesDataModule(train_images=61, test_images=13, eval_batch_size=6)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    with torch.no_grad():
        model.network.get_submodule(model.heads[0]).weight.mul_(
            50
        )  # so that images differ in their loss
    trainer = quiet_trainer(default_root_dir=tmp_path, accelerator="cpu")
    trainer.validate(model, data, verbose=False)
    found = {name: float(score) for name, score in trainer.callback_metrics.items()}
    found |= trainer.test(model, data, verbose=False)[0]
    for split, images in data.images.items():
        pixels, labels = images.__getitems__(range(len(images)))
        with torch.inference_mode():
            losses = F.cross_entropy(model(pixels.float() / 255), labels, reduction="none")
        if split != "train":
            assert found[f"{split}/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
            batches = torch.stack([batch.mean() for batch in losses.split(6)])
            assert float(batches.mean()) != pytest.approx(float(losses.mean()), rel=1e-3), (
                "this shows nothing"
            )
    trained = TransferClassifier("lenet5", "none")
    for loss, count in ((1.0, 5), (4.0, 1)):
        trained.loss = lambda images, logits, labels, loss=loss: torch.tensor(loss)
        labels = torch.zeros(count, dtype=torch.long)
        trained.training_step((torch.rand(count, 3, 32, 32), labels), 0)
    assert float(trained.train_loss.compute()) == pytest.approx(9 / 6)
