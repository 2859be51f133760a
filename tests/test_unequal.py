"""Classes of unequal size: weights in the loss, a sampler, scores that count classes alike."""

import json
import os
import re
import signal
import subprocess
import sys
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
from cifar_transfer.training.resume import refuse_changes

SHAPES = {"drop": 1, "tee": 3, "flower": 5}  # and their labels among all
JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--freeze.unfreeze_epoch=0",
    "--trainer.accelerator=cpu",
]
JOB += ["--report.figures=false", "--data=ImageFolderDataModule", "--data.batch_size=16"]
LAST = f"{RUN}/checkpoints/last.ckpt"
BATCH_SIZE = 4  # of the tests of the sampler


def write_shapes(folder, counts, seed=0):
    """Write an image folder with some drawn images of each of `SHAPES`."""
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
def in_tmp_path(tmp_path, monkeypatch):
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
    expected = torch.tensor(counts.sum() / (3 * counts), dtype=torch.float32)
    torch.testing.assert_close(data.loss_weights(), expected)
    message = f"Classes of {counts[1]} (flower) to {counts[0]} (drop) training images, with weights"
    assert message in caplog.text


def test_given_weights_keep_their_ratios_and_have_a_mean_of_one_over_the_images_drawn(photos):
    for sampler in (None, "balanced"):
        data = ImageFolderDataModule(str(photos), class_weights=[1, 10, 4], sampler=sampler)
        data.setup()
        weights = data.loss_weights()
        labels = data.images["train"].labels
        torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 10.0, 4.0]))
        mean = weights.mean() if sampler else weights[labels].mean()
        assert float(mean) == pytest.approx(1, abs=1e-6)


def test_a_message_tells_of_unequal_classes_and_of_the_remedies(caplog, photos):
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


def test_the_loss_of_a_step_is_the_mean_of_the_weighted_losses_of_its_images(photos):
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


def rows_of_epochs(count, world_size, labels):
    """Return for each epoch the rows that each process reads with the balanced sampler."""
    images = ArrayImages(np.zeros((len(labels), 3, 1, 1), np.uint8), np.array(labels))
    loaders = []
    for rank in range(world_size):
        shard = Shard(images, rank=rank, world_size=world_size)
        loaders.append(training_loader(shard, BATCH_SIZE, seed=3, balanced=True))
    epochs = []
    for epoch in range(count):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        epochs.append([list(chain(*loader.batch_sampler)) for loader in loaders])
    return epochs


def assert_drawn_equally_often(rows, labels):
    """Check that classes, and images of a class, are drawn equally often, up to one."""
    draws_of_images = np.bincount(rows, minlength=len(labels))
    draws_of_classes = np.bincount(labels[rows])
    assert np.ptp(draws_of_classes) <= 1
    for label in range(labels.max() + 1):
        assert np.ptp(draws_of_images[labels == label]) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(40, 7, 3), (9, 1, 13), (5, 5, 7, 2)])
def test_classes_and_images_of_a_class_are_drawn_equally_often(world_size, sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(range(len(sizes)), sizes))
    num_samples = -(-len(labels) // world_size)
    if num_samples % BATCH_SIZE == 1:  # a batch of one is left out, as without the sampler
        num_samples -= 1
    rows_so_far = []
    for shards in rows_of_epochs(5, world_size, labels):
        assert [len(shard) for shard in shards] == [num_samples] * world_size
        rows = list(chain(*shards))
        rows_so_far += rows
        assert_drawn_equally_often(rows, labels)
        assert_drawn_equally_often(rows_so_far, labels)


def test_processes_share_the_order_of_one_process_which_differs_from_epoch_to_epoch():
    labels = np.repeat([0, 1], [20, 4])
    alone = rows_of_epochs(2, 1, labels)
    shared = rows_of_epochs(2, 2, labels)
    for (whole,), shards in zip(alone, shared, strict=True):
        assert [*chain(*zip(*shards, strict=True))] == whole
    assert alone == rows_of_epochs(2, 1, labels), "the order follows from the seed"
    assert alone[0] != alone[1]
    assert not np.diff(labels[alone[0][0]]).all(), "the classes are shuffled"


@pytest.mark.filterwarnings("ignore:val_fraction=0")
@pytest.mark.parametrize(
    "option", [{"sampler": "balanced"}, {"class_weights": "balanced"}, {"class_weights": [1] * 10}]
)
def test_a_class_without_training_images_is_refused(in_tmp_path, tmp_path, option):
    ((name, value),) = option.items()
    job = [*JOB[:-2], "--data=ShapesDataModule", "--data.train_images=8", "--data.test_images=9"]
    job += ["--data.val_fraction=0"]  # a single image of a class is never held out
    with (
        untouched(tmp_path),
        pytest.raises(UserError, match=f"{name} needs .* every class: add some of .*, or leave"),
    ):
        fit([*job, f"--data.{name}={value}"])
    fit([*job, "--trainer.max_epochs=1"])  # without the option it trains


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
def test_options_that_make_no_sense_are_refused_in_a_sentence(options, words):
    with pytest.raises(UserError, match=words):
        shapes(**options).loss_weights()


def test_a_change_on_resuming_is_refused():
    before = {"data.class_weights": None, "data.sampler": None}
    for name in before:
        with pytest.raises(UserError, match=f"{name}=balanced differs from null"):
            refuse_changes(before, before | {name: "balanced"})


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_is_one_never_stopped(tmp_path, photos, monkeypatch):
    job = [
        *JOB,
        f"--data.root={photos}",
        "--data.sampler=balanced",
        "--data.class_weights=[1, 2, 0.5]",
    ]
    job += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    monkeypatch.setattr("sys.argv", ["fit"])
    monkeypatch.chdir(whole)
    fit(job)

    training_step = TransferClassifier.training_step
    steps = []

    def stop_in_the_second_epoch(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 13:  # of nine an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    monkeypatch.chdir(stopped)
    monkeypatch.setattr(TransferClassifier, "training_step", stop_in_the_second_epoch)
    with pytest.raises(SystemExit, match="143"):
        fit(job)
    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    with untouched(stopped), pytest.raises(UserError, match="sampler=null differs from balanced"):
        fit([f"--resume={RUN}", "--data.sampler=null"])
    fit([f"--resume={RUN}"])
    assert_same_weights(whole / LAST, stopped / LAST)
    assert curves(whole / RUN)["train/loss"] == curves(stopped / RUN)["train/loss"]


@pytest.mark.whole
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


@pytest.mark.slow
def test_reports_count_classes_alike_where_they_are_unequal(in_tmp_path, photos, capsys):
    outcome = fit([*JOB, f"--data.root={photos}", "--trainer.max_epochs=2"])
    output = capsys.readouterr().out
    result = json.loads(Path(RUN, "result.json").read_text())
    assert {
        f"best/{split}_{name}"
        for split in ("val", "test")
        for name in ("acc", "balanced_accuracy", "macro_f1")
    } == {name for name in result if name.startswith("best/")}
    assert result.items() >= outcome.scores.items()
    found = evaluate(str(outcome.best), accelerator="cpu", figures=True)
    printed = capsys.readouterr().out
    with np.load(Path(RUN, "figures/predictions-test.npz")) as kept:
        guesses, labels = (torch.from_numpy(kept[name]) for name in ("logits", "labels"))
    references = {"balanced_accuracy": multiclass_accuracy, "macro_f1": multiclass_f1_score}
    for name, reference in references.items():
        value = float(reference(guesses.float(), labels, 3, average="macro"))
        assert (
            result[f"best/test_{name}"] == found[f"test/{name}"] == pytest.approx(value, abs=1e-6)
        )
        assert f"test/{name}  {value:.2%}\n" in printed
        label = name.replace("_", " ").replace("f1", "F1")
        assert re.search(rf"^test {label} +{value:.2%}$", output, re.MULTILINE)
        assert curves(RUN)[f"test/{name}"][0][1] == pytest.approx(value, abs=1e-6)
    assert found["test/acc"] != found["test/balanced_accuracy"]


def test_reports_of_equal_classes_do_not_repeat_the_accuracy(in_tmp_path, tmp_path, capsys):
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


@pytest.mark.slow
def test_rare_classes_are_recognised_better(tmp_path):
    """The rarer a class, the brighter its images; classes overlap, so that their sizes matter."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (600, 30, 15)), ("test", (150, 150, 150))):
        images, _ = draw("downstream", sum(counts), counts[0])
        labels = np.repeat(range(3), counts)
        for number, label in enumerate(labels):
            brightness = rng.normal(60 + 40 * label, 35)
            pixels = (0.3 * images[number] + brightness).clip(0, 255).astype(np.uint8)
            path = tmp_path / split / "abc"[label] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    still = Augment(padding=0, brightness=0, contrast=0, saturation=0, hue=0, degrees=0)
    accuracies = []
    for option in ({}, {"class_weights": "balanced"}, {"sampler": "balanced"}):
        seed_everything(0)
        data = ImageFolderDataModule(str(tmp_path), batch_size=32, augment=still, **option)
        model = TransferClassifier("lenet5", "none", num_classes=3, lr=0.003)
        trainer = quiet_trainer(max_epochs=6, limit_val_batches=0)
        trainer.fit(model, data)
        (scores,) = trainer.test(model, data, verbose=False)
        accuracies.append(scores["test/acc"])  # balanced, because the test images are
    assert min(accuracies[1:]) > accuracies[0] + 0.1, accuracies
