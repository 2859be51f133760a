"""What `evaluate` says of a checkpoint: scores by hand and by libraries, coverage, new images."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, run_fit, untouched, write_images
from lightning import LightningDataModule
from PIL import Image
from test_plots import assert_nothing_is_cut_off, some_predictions
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.evaluate import main as evaluate_command
from cifar_transfer.data import cifar, library
from cifar_transfer.results import plots, score_table
from cifar_transfer.results.coverage import answered, coverage_curve
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.results.scores import class_scores, score, wilson_interval
from cifar_transfer.results.words import language

BEST = f"{RUN}/checkpoints/best.ckpt"


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
        (9116, 10000, 0.9058769, 0.9170070),
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
    ],
)
def test_the_interval_is_that_of_wilson(hits, count, low, high):
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=1e-6)
    for bound in wilson_interval(hits, count):  # by its definition, a quadratic equation
        if 1e-9 < bound < 1:
            z = (hits / count - bound) / math.sqrt(bound * (1 - bound) / count)
            assert abs(z) == pytest.approx(1.959964, abs=1e-4)


def test_the_scores_of_classes_are_those_of_scikit_learn():
    """By hand, as `precision_recall_fscore_support(zero_division=0)` gives them."""
    # True classes a a a b c; predicted a a b b b. The fourth class has no images.
    confusion = np.array([[2, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    scores = class_scores(confusion)
    assert scores.precision.tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert scores.recall.tolist() == pytest.approx([2 / 3, 1, 0, 0])
    assert scores.f1.tolist() == pytest.approx([0.8, 0.5, 0, 0])
    assert scores.support.tolist() == [3, 1, 1, 0]
    # `balanced_accuracy_score` leaves the class without images out.
    assert scores.balanced_accuracy == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_scores_are_those_of_torchmetrics():
    names = [f"class {number}" for number in range(8)]
    predictions = some_predictions(names, count=500, temperature=1.7)
    scores = score(predictions)
    logits = predictions.logits
    labels = predictions.labels
    accuracy = float(multiclass_accuracy(logits, labels, 8, average="micro"))
    assert scores.accuracy == pytest.approx(accuracy, abs=1e-6)
    for name, metric in (
        ("precision", multiclass_precision),
        ("recall", multiclass_recall),
        ("f1", multiclass_f1_score),
    ):
        expected = metric(logits, labels, 8, average="none").tolist()
        assert getattr(scores.classes, name).tolist() == pytest.approx(expected, abs=1e-6)
    balanced = float(multiclass_accuracy(logits, labels, 8, average="macro"))
    assert scores.classes.balanced_accuracy == pytest.approx(balanced, abs=1e-6)
    in_five = (logits.topk(5).indices == labels[:, None]).any(1)
    assert scores.top5_accuracy == pytest.approx(float(in_five.float().mean()))
    for nll, error, temperature in (
        (scores.nll, scores.bins.calibration_error, 1.7),
        (scores.nll_before, scores.error_before, 1.0),
    ):
        shares = (logits / temperature).softmax(1)
        expected = float(-shares[range(500), labels].log().mean())
        assert nll == pytest.approx(expected, abs=1e-5)
        expected = float(multiclass_calibration_error(shares, labels, 8, n_bins=15))
        assert error == pytest.approx(expected, abs=1e-6)
    assert score(some_predictions(names[:5])).top5_accuracy is None


def test_tables_and_json_say_the_same():
    names = [f"class {number}" for number in range(30)]
    scores = score(some_predictions(names, temperature=0.7))
    content = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert sum(row["images"] for row in content["bins"]) == content["images"] == 300
    assert sum(row["support"] for row in content["classes"]) == 300
    gaps = [row["images"] * abs(row["accuracy"] - row["confidence"]) for row in content["bins"]]
    assert sum(gaps) / 300 == pytest.approx(content["calibration_error"])
    text = score_table.score_lines(scores)
    low, high = content["accuracy_interval"]
    assert f"{scores.accuracy:.2%} of 300 images, {low:.2%} to {high:.2%} (95 % interval)" in text
    assert "with temperature 0.70" in text
    _, _, *rows = score_table.class_table(scores).splitlines()
    assert rows.pop() == "The 20 of 30 classes with the lowest F1."
    worst = sorted(content["classes"], key=lambda row: row["f1"])[:20]
    assert [row.split("|")[1].strip() for row in rows] == [row["class"] for row in worst]
    _, _, *rows = score_table.bin_table(scores).splitlines()
    assert len(rows) == sum(row["images"] > 0 for row in content["bins"])
    assert "with temperature" not in score_table.score_lines(score(some_predictions(names)))


def test_what_is_answered_rises_with_lower_thresholds_and_ties_stay_together():
    """Confidences 0.9, 0.8, 0.8, 0.6, of which the second and the last are wrong."""
    first = torch.tensor([0.9, 0.8, 0.8, 0.6])
    logits = torch.stack((first, 1 - first), 1).log()
    labels = torch.tensor([0, 1, 0, 1])
    nothing = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    predictions = Predictions(["a", "b"], labels, logits, torch.arange(0), nothing)
    curve = coverage_curve(predictions)
    assert curve.shares.tolist() == [0.25, 0.75, 1]
    assert curve.accuracies.tolist() == pytest.approx([1, 2 / 3, 0.5])
    assert answered(predictions, 0.85) == (0.25, 1.0)
    assert answered(predictions, 0.0) == (1.0, 0.5)
    assert answered(predictions, 0.95) == (0.0, None)
    assert "|      0.95 |          0.0 |              |" in score_table.coverage_table(
        score(predictions)
    )


@pytest.mark.parametrize("name", ["en", "zh"])
def test_the_figure_of_coverage_is_whole(name):
    for names in (["a", "b"], [f"class {number}" for number in range(9)]):
        with language(name):
            figure = plots.coverage(some_predictions(names))
        assert_nothing_is_cut_off(figure)


def as_folders(source, target, classes=None):
    """Write the images that a run has kept as folders of classes, sorted by the labels."""
    predictions = Predictions.load(source)
    labels = predictions.labels[predictions.rows].tolist()
    kept = 0
    for number, label in enumerate(labels):
        name = predictions.names[label]
        if classes is None or name in classes:
            folder = target / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = predictions.images[number].numpy().transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / f"{number:03}.png")
            kept += 1
    right = predictions.correct[predictions.rows]
    if classes is not None:
        right = right[[predictions.names[label] in classes for label in labels]]
    return kept, float(right.float().mean())


@pytest.fixture
def own_run(run, tmp_path, monkeypatch):
    """A copy of the run of drawn shapes, in the current folder."""
    shutil.copytree(run / "lightning_logs", tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / RUN


def test_new_images_are_scored_by_the_classes_of_the_checkpoint(own_run, tmp_path, capsys):
    kept = own_run / "figures/predictions-test.npz"
    names = Predictions.load(kept).names
    some = set(names[:4])
    count, accuracy = as_folders(kept, tmp_path / "new/test", some)
    of_run = kept.read_bytes()
    evaluate_command(
        [f"--ckpt={BEST}", "--root=new", "--accelerator=cpu", "--format=json", "--coverage=true"]
    )
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["images"] == count
    assert content["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert content["scores"]["test/acc"] == pytest.approx(accuracy, abs=1e-6)
    assert [row["class"] for row in content["classes"]] == names, "some have no images"
    assert kept.read_bytes() == of_run, "the figures of the run's own test stay"
    written = {path.name for path in (own_run / "figures").glob("new-test-*")}
    assert {"new-test-scores.json", "new-test-coverage.png", "new-test-confusion.png"} <= written
    kept_scores = json.loads((own_run / "figures/new-test-scores.json").read_text())
    assert kept_scores == {key: content[key] for key in kept_scores}
    assert "new-test-*.png" in printed.err

    shutil.move(tmp_path / "new/test", tmp_path / "plain")  # the classes alone
    scores = evaluate(BEST, root="plain", accelerator="cpu", figures=False)
    assert scores["test/acc"] == pytest.approx(accuracy, abs=1e-6)
    assert f"{accuracy:.2%} of {count} images" in capsys.readouterr().out

    write_images(tmp_path / "plain", 1, classes=["zebra"])
    with (
        untouched(own_run),
        pytest.raises(
            UserError, match=r"plain has folders that are no classes .*\(zebra\): rename"
        ),
    ):
        evaluate(BEST, root="plain", accelerator="cpu")
    with pytest.raises(UserError, match="There is no folder gone: name that of the data"):
        evaluate(BEST, root="gone", accelerator="cpu")
    Path("empty/test").mkdir(parents=True)
    with pytest.raises(UserError, match="empty/test has no images of"):
        evaluate(BEST, root="empty", accelerator="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"data": "CIFAR10DataModule", "url": None},
        {
            "data": "TorchvisionDataModule",
            "name": "CIFAR100",
            "decode_size": None,
            "fit": "crop",
            "cache_limit_gb": 8.0,
        },
    ],
    ids=lambda options: options["data"],
)
@pytest.mark.parametrize("split", ["test", "val"])
def test_a_data_set_is_not_downloaded_into_a_folder_without_images(
    run, tmp_path, monkeypatch, options, split
):
    monkeypatch.setattr(cifar, "download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setattr(library, "within", lambda *_: pytest.fail("downloaded"))
    checkpoint = torch.load(run / BEST, weights_only=True)
    options_of_run = checkpoint[LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY]
    for name in ("task", "train_images", "test_images"):
        del options_of_run[name]
    options_of_run.update(options, root="data")
    torch.save(checkpoint, tmp_path / "best.ckpt")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("no images")
    message = "mine has neither the images of the run nor new ones in test/CLASS/: name another"
    with untouched(mine), pytest.raises(UserError, match=message):
        evaluate(tmp_path / "best.ckpt", split, root=str(mine), accelerator="cpu")


@pytest.mark.slow
def test_a_run_keeps_the_scores_that_evaluate_prints(own_run, capsys):
    written = json.loads((own_run / "figures/test-scores.json").read_text())
    evaluate(BEST, accelerator="cpu", figures=False, format="json")
    printed = json.loads(capsys.readouterr().out)
    for key in ("images", "accuracy", "temperature", "classes"):
        assert written[key] == printed[key]
    assert written["nll"] == pytest.approx(printed["nll"], abs=1e-5)
    outcome = json.loads((own_run / "result.json").read_text())
    assert printed["accuracy"] == pytest.approx(outcome["best/test_acc"], abs=1e-6)


@pytest.mark.whole
def test_two_processes_print_the_scores_of_one(own_run, capsys):
    evaluate(BEST, accelerator="cpu", figures=False, format="json")
    of_one = json.loads(capsys.readouterr().out)
    options = [f"--ckpt={BEST}", "--accelerator=cpu", "--devices=2", "--format=json"]
    done = run_fit(Path.cwd(), *options, "--figures=false", command="evaluate")
    of_two = json.loads(done.stdout)
    for key in ("images", "accuracy", "accuracy_interval", "temperature", "classes"):
        assert of_two[key] == of_one[key]


@pytest.mark.slow
def test_a_folder_of_classes_is_that_of_the_run_or_new(tmp_path, monkeypatch, capsys):
    """A run on such a folder holds its test images out; they alone are tested when it has moved."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 30)
    run_fit(
        tmp_path,
        *("--data=ImageFolderDataModule", "--data.root=photos", "--data.batch_size=8"),
        *("--model.backbone=lenet5", "--model.weights=none", "--freeze.unfreeze_epoch=0"),
        *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--report.figures=false"),
    )

    def count_of(root):
        evaluate(BEST, root=root, accelerator="cpu", figures=False, format="json")
        return json.loads(capsys.readouterr().out)["images"]

    capsys.readouterr()
    held_out = count_of("photos")
    assert 0 < held_out < 30
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert count_of("moved") == held_out
    write_images(tmp_path / "new", 7, classes=["dog"])
    assert count_of("new") == 7
    (tmp_path / RUN / "splits.json.gz").unlink()
    assert count_of("moved") == held_out, "without the record none is taken for new"
