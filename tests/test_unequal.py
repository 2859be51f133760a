"""Classes of unequal size: weights in the loss, a sampler, scores that count classes alike."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RUN, assert_same_weights, curves, quiet_trainer, untouched
from lightning import seed_everything
from PIL import Image
from torchmetrics.classification import MulticlassStatScores
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from cifar_transfer import Augment, ImageFolderDataModule, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.fit import fit
from cifar_transfer.data.images import ArrayImages
from cifar_transfer.data.loading import Shard, training_loader
from cifar_transfer.data.shapes import draw
from cifar_transfer.training.classifier import class_scores
from cifar_transfer.training.loss import LossOptions, TrainingLoss
from cifar_transfer.training.resume import compare

SHAPES = {"drop": 1, "tee": 3, "flower": 5}  # and their places among all
JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--freeze.unfreeze_epoch=0",
    "--trainer.accelerator=cpu",
]
JOB += ["--report.figures=false", "--data=ImageFolderDataModule", "--data.batch_size=16"]


def write_shapes(folder, counts, seed=0):
    """An image folder with so many drawn images of each of `SHAPES`."""
    images, labels = draw("downstream", 10 * max(counts), seed)
    for name, count in zip(SHAPES, counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(images[labels == SHAPES[name]][:count]):
            Image.fromarray(pixels).save(folder / name / f"{number:04}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """120 drops, 24 tees and 12 flowers to train on, and an unequal test."""
    folder = tmp_path_factory.mktemp("unequal")
    write_shapes(folder / "train", (120, 24, 12))
    write_shapes(folder / "test", (20, 5, 10), seed=1)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])


def shapes(**options):
    data = ShapesDataModule(**{"train_images": 57, "test_images": 20} | options)
    data.setup()
    return data


def test_balanced_weights_are_those_of_scikit_learn(caplog, photos):
    data = ImageFolderDataModule(str(photos), val_fraction=0.25, class_weights="balanced")
    data.setup()
    counts = np.bincount(data.images["train"].labels)
    assert counts.sum() < 156, "held-out images do not count"
    torch.testing.assert_close(
        data.loss_weights(), torch.tensor(counts.sum() / (3 * counts), dtype=torch.float32)
    )
    assert (
        f"Classes of {counts[1]} (flower) to {counts[0]} (drop) training images, with weights from 0."
        in caplog.text
    )


def test_given_weights_keep_their_ratios_and_have_a_mean_of_one_over_the_images_drawn(photos):
    for sampler in (None, "balanced"):
        data = ImageFolderDataModule(str(photos), class_weights=[1, 10, 4], sampler=sampler)
        data.setup()
        weights, labels = data.loss_weights(), data.images["train"].labels
        torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 10.0, 4.0]))
        mean = weights.mean() if sampler else weights[labels].mean()
        assert float(mean) == pytest.approx(1, abs=1e-6)


def test_unequal_classes_are_pointed_out_with_what_helps(caplog, photos):
    data = ImageFolderDataModule(str(photos))
    data.setup()
    assert data.loss_weights() is None
    assert (
        "(drop) training images: --data.class_weights=balanced or --data.sampler=balanced makes up"
        in caplog.text
    )
    caplog.clear()
    assert shapes(train_images=60).loss_weights() is None
    assert "makes up" not in caplog.text


def test_a_step_is_the_mean_over_images_of_each_with_its_weight(photos):
    data = ImageFolderDataModule(str(photos), class_weights="balanced", batch_size=16)
    model = TransferClassifier("lenet5", "none", num_classes=3)
    quiet_trainer(max_steps=0).fit(model, data)
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 0, 1])
    weights = data.loss_weights()
    logits = torch.randn(8, 3)
    loss = TrainingLoss(LossOptions(label_smoothing=0.2), class_weights=weights)
    smooth = F.one_hot(labels, 3) * 0.8 + 0.2 / 3
    losses = -(smooth * logits.log_softmax(1)).sum(1)
    expected = (weights[labels] * losses).sum() / 8
    torch.testing.assert_close(loss(torch.rand(8, 3, 32, 32), logits, labels), expected)
    assert torch.equal(model.loss.class_weights, weights)


def epochs(count, world, labels, batch_size=4):
    """Rows that each process reads in each epoch."""
    images = ArrayImages(np.zeros((len(labels), 3, 1, 1), np.uint8), np.array(labels))
    loaders = [
        training_loader(Shard(images, 0, rank, world), batch_size, seed=3, balanced=True)
        for rank in range(world)
    ]
    read = []
    for epoch in range(count):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        read.append([list(chain(*loader.batch_sampler)) for loader in loaders])
    return read


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(40, 7, 3), (9, 1, 13), (5, 5, 7, 2)])
def test_each_class_and_of_a_class_each_image_is_drawn_equally_often(world, sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(range(len(sizes)), sizes))
    total = Counter()
    for shards in epochs(5, world, labels):
        each = -(-len(labels) // world)
        each -= each % 4 == 1  # as without the sampler, a batch of one is left out
        assert [len(shard) for shard in shards] == [each] * world
        rows = np.array([*chain(*shards)])
        for counts in (
            Counter(rows.tolist()),
            total := total + Counter(rows.tolist()),
        ):  # in an epoch, and over epochs
            seen = [
                [counts[row] for row in np.flatnonzero(labels == label)]
                for label in range(len(sizes))
            ]
            assert np.ptp([sum(of_class) for of_class in seen]) <= 1
            assert all(max(of_class) - min(of_class) <= 1 for of_class in seen)


def test_processes_share_the_order_of_one_which_is_another_in_each_epoch():
    labels = np.repeat([0, 1], [20, 4])
    alone, shared = epochs(2, 1, labels), epochs(2, 2, labels)
    for (whole,), shards in zip(alone, shared, strict=True):
        assert [*chain(*zip(*shards, strict=True))] == whole
    assert alone == epochs(2, 1, labels), "it follows from the seed"
    assert alone[0] != alone[1]
    assert not np.diff(labels[alone[0][0]]).all(), "classes come in no order"


@pytest.mark.parametrize(
    "option", [{"sampler": "balanced"}, {"class_weights": "balanced"}, {"class_weights": [1] * 10}]
)
def test_a_class_without_training_images_is_refused(here, tmp_path, option):
    ((name, value),) = option.items()
    job = [*JOB[:-2], "--data=ShapesDataModule", "--data.train_images=8", "--data.test_images=9"]
    job += ["--data.val_fraction=0"]  # of a single image none is held out
    with (
        untouched(tmp_path),
        pytest.raises(UserError, match=f"{name} needs .* every class: add some of .*, or leave"),
    ):
        fit([*job, f"--data.{name}={value}"])
    fit([*job, "--trainer.max_epochs=1"])  # which is trained without


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"class_weights": [1.0, 2.0]},
            "class_weights has 2 numbers for 10 classes: give one for each",
        ),
        *[
            ({"class_weights": [1.0] * 9 + [bad]}, "take balanced, or a number from")
            for bad in (0, -1, np.nan, np.inf)
        ],
        *[
            ({"class_weights": bad}, "class_weights is .*: take balanced, or")
            for bad in ("text", [], 3, ["1"] * 10)
        ],
        ({"sampler": "weighted"}, "sampler is weighted: take balanced, or null"),
        (
            {"sampler": "balanced", "class_weights": "balanced"},
            "for the same twice: take one of them",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(options, words):
    with pytest.raises(UserError, match=words):
        shapes(**options).loss_weights()


def test_a_change_on_resuming_is_said_and_within_an_epoch_other_images_are_refused():
    saved = {"data.class_weights": None, "data.sampler": None}
    for name, effect in (
        ("data.class_weights", "the training loss is another"),
        ("data.sampler", "draws other images"),
    ):
        (said,) = compare(saved, saved | {name: "balanced"}, within_epoch=False, unfrozen=False)
        assert effect in said
    with pytest.raises(UserError, match="sampler=balanced would skip images of the epoch"):
        compare(saved, saved | {"data.sampler": "balanced"}, within_epoch=True, unfrozen=False)
    assert compare(saved, saved | {"data.class_weights": [1.0]}, within_epoch=True, unfrozen=False)


def test_a_run_that_is_stopped_and_resumed_is_one_never_stopped(tmp_path, photos, monkeypatch):
    job = [
        *JOB,
        f"--data.root={photos}",
        "--data.sampler=balanced",
        "--data.class_weights=[1, 2, 0.5]",
    ]
    job += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    step, steps = TransferClassifier.training_step, []

    def stop(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 13:  # of nine an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr("sys.argv", ["fit"])
    for folder, way in zip(folders, (step, stop), strict=True):
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(TransferClassifier, "training_step", way)
        if way is step:
            fit(job)
    with pytest.raises(SystemExit, match="143"):
        fit(job)
    monkeypatch.setattr(TransferClassifier, "training_step", step)
    with untouched(folders[1]), pytest.raises(UserError, match="sampler=None would skip images"):
        fit([f"--resume={RUN}", "--data.sampler=null"])
    fit([f"--resume={RUN}"])
    assert_same_weights(*(folder / RUN / "checkpoints/last.ckpt" for folder in folders))
    whole, resumed = (curves(folder / RUN) for folder in folders)
    assert whole["train/loss"] == resumed["train/loss"]


@pytest.mark.slow
def test_a_step_of_two_processes_has_the_gradients_of_their_joint_batch(tmp_path):
    command = [
        sys.executable,
        Path(__file__).with_name("ddp_job.py"),
        tmp_path,
        "auto",
        "2",
        "balanced",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["steps"][1] for rank in range(2)
    ]
    images, labels = (torch.cat([step[key] for step in steps]) for key in ("images", "labels"))
    data = ShapesDataModule(
        train_images=157, test_images=45, val_fraction=0.4, class_weights="balanced"
    )
    data.setup()
    weights = data.loss_weights()
    sums = [float(weights[step["labels"]].sum()) for step in steps]
    assert abs(sums[0] / sums[1] - 1) > 0.01, "or a mean by weights would be the same"
    model = TransferClassifier("shufflenet_v2_x0_5", "none", normalize="cifar10")
    model.load_state_dict(steps[0]["before"])
    model.eval()
    (F.cross_entropy(model(images), labels, reduction="none") * weights[labels]).mean().backward()
    for name, parameter in model.named_parameters():
        for step in steps:
            torch.testing.assert_close(
                step["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
            )


def test_scores_by_class_are_those_of_torchmetrics_and_leave_out_classes_without_images():
    torch.manual_seed(0)
    logits, labels = torch.randn(300, 5), torch.randint(0, 5, (300,)) % 4
    for rows in (labels < 9, labels > 1):
        counts = MulticlassStatScores(5, average=None)
        for part in torch.arange(len(labels))[rows].split(64):
            counts.update(logits[part], labels[part])
        scores = class_scores(counts.compute())
        classes = labels[rows].unique()
        for name, reference in (
            ("balanced_accuracy", multiclass_accuracy),
            ("macro_f1", multiclass_f1_score),
        ):
            by_class = reference(logits[rows], labels[rows], 5, average="none")
            torch.testing.assert_close(scores[name], by_class[classes].mean())


def test_reports_count_classes_alike_where_they_are_unequal(here, photos, capsys):
    outcome = fit([*JOB, f"--data.root={photos}", "--trainer.max_epochs=2"])
    said, result = capsys.readouterr().out, json.loads(Path(RUN, "result.json").read_text())
    assert {
        f"best/{split}_{name}"
        for split in ("val", "test")
        for name in ("acc", "balanced_accuracy", "macro_f1")
    } == {name for name in result if name.startswith("best/")}
    assert result.items() >= outcome.scores.items()
    found = evaluate(str(outcome.best), accelerator="cpu", figures=True)
    printed = capsys.readouterr().out
    with np.load(Path(RUN, "figures/predictions-test.npz")) as kept:
        guesses, labels = (torch.from_numpy(kept[name]) for name in ("probabilities", "labels"))
    references = {"balanced_accuracy": multiclass_accuracy, "macro_f1": multiclass_f1_score}
    for name, reference in references.items():
        value = float(reference(guesses.float(), labels, 3, average="macro"))
        assert (
            result[f"best/test_{name}"] == found[f"test/{name}"] == pytest.approx(value, abs=1e-6)
        )
        assert f"test/{name}  {value:.2%}\n" in printed
        assert re.search(
            rf"^test {name.replace('_', ' ').replace('f1', 'F1')} +{value:.2%}$", said, re.MULTILINE
        )
        assert curves(RUN)[f"test/{name}"][0][1] == pytest.approx(value, abs=1e-6)
    assert found["test/acc"] != found["test/balanced_accuracy"]


def test_reports_of_equal_classes_do_not_repeat_the_accuracy(here, tmp_path, capsys):
    write_shapes(tmp_path / "photos/train", (20, 20, 20))
    write_shapes(tmp_path / "photos/test", (5, 5, 5), seed=1)
    outcome = fit([*JOB, "--data.root=photos", "--data.val_fraction=0.3", "--trainer.max_epochs=1"])
    assert outcome.scores.keys() == {"best/val_acc", "best/test_acc"}, (
        "though not as many of each are held out"
    )
    assert evaluate(str(outcome.best), "val", accelerator="cpu", figures=False).keys() == {
        "val/loss",
        "val/acc",
    }
    assert "macro" not in capsys.readouterr().out


def test_rare_classes_are_told_better(tmp_path):
    """Drawn images, the brighter the rarer their class, but overlapping, so that how many there are decides."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (600, 30, 15)), ("test", (150, 150, 150))):
        images, _ = draw("downstream", sum(counts), counts[0])
        for number, (label, pixels) in enumerate(
            zip(np.repeat(range(3), counts), images, strict=True)
        ):
            brighter = (
                (0.3 * pixels + rng.normal(60 + 40 * label, 35)).clip(0, 255).astype(np.uint8)
            )
            path = tmp_path / split / "abc"[label] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(brighter).save(path)
    still = Augment(padding=0, brightness=0, contrast=0, saturation=0, hue=0, degrees=0)
    accuracies = []
    for option in ({}, {"class_weights": "balanced"}, {"sampler": "balanced"}):
        seed_everything(0)
        data = ImageFolderDataModule(str(tmp_path), batch_size=32, augment=still, **option)
        model = TransferClassifier("lenet5", "none", num_classes=3, lr=0.003)
        trainer = quiet_trainer(max_epochs=6, limit_val_batches=0)
        trainer.fit(model, data)
        accuracies.append(
            trainer.test(model, data, verbose=False)[0]["test/acc"]
        )  # balanced, as the test is
    assert min(accuracies[1:]) > accuracies[0] + 0.1, accuracies
