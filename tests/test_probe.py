"""Features of frozen backbones, heads on them, and the checkpoints that these become."""

import csv
import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RUN, TINY, quiet_trainer, run_fit, untouched, weights, write_images

from cifar_transfer import (
    Classifier,
    ImageFolderDataModule,
    ShapesDataModule,
    TransferClassifier,
)
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands import probe
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.data.splits import SPLITS
from cifar_transfer.features import extract as extraction
from cifar_transfer.features import heads, logistic, standardise
from cifar_transfer.features.chosen_rows import ChosenRows
from cifar_transfer.features.extract import FeatureExtractor, Features, extract_features
from cifar_transfer.features.new_head import set_head
from cifar_transfer.features.standardise import fit_standardisation
from cifar_transfer.features.store import FeatureFile, make_room
from cifar_transfer.network.image_classifier import ImageClassifier, NetworkOptions
from cifar_transfer.results import probe_table
from cifar_transfer.results.intervals import mean_interval
from cifar_transfer.results.probe_result import ProbedNetwork, ProbeResult
from cifar_transfer.training import lightning_internals

SIZES = {"train_images": 300, "test_images": 70}
NETWORK = "shufflenet_v2_x0_5"
BACKBONE_FOLDER = f"{NETWORK}-from-scratch"
PROBE_OPTIONS = [
    "--model.image_size=64",
    "--features=kept",
    "--trainer.limit_test_batches=1",
    "--trainer.fast_dev_run=true",
    *TINY[2:],
]
PROBED = f"lightning_logs/probe/{BACKBONE_FOLDER}"
CHECKPOINT = f"{PROBED}/checkpoints/best.ckpt"


def extract(folder, views=1, seed=0, limit_gb=1.0, network=NETWORK, precision="32-true", **options):
    """Features of drawn shapes by an untrained network, and their extractor."""
    torch.manual_seed(seed)
    data = ShapesDataModule(**SIZES | options)
    model = TransferClassifier(network, "none", class_names=data.class_names, image_size=64)
    trainer = quiet_trainer(precision=precision, use_distributed_sampler=False)
    extractor = FeatureExtractor(model.classifier, data, folder, views, limit_gb)

    def settle():
        lightning_internals.attach(trainer, model, data)
        model.setup("test")

    return extract_features(trainer, extractor, settle), extractor


def untrained(backbone, size):
    options = NetworkOptions(backbone, "none", num_classes=10, image_size=size)
    return ImageClassifier(options).eval()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def pixels(images):
    """All images of a split, float32 in [0, 1]."""
    return torch.from_numpy(images.pixels(np.arange(len(images)))) / 255


def test_features_are_the_input_of_the_head(tmp_path):
    features, extractor = extract(tmp_path, views=3)
    model = extractor.classifier
    images = extractor.data.images
    with torch.inference_mode():
        for split in ("train", "val", "test"):
            array = features[split].views[0]
            assert array.dtype == np.float32
            logits = model.network.fc(torch.from_numpy(np.array(array)))
            torch.testing.assert_close(logits, model(pixels(images[split])), atol=1e-5, rtol=0)
        plain, mirrored, augmented = features["train"].views
        logits = model.network.fc(torch.from_numpy(np.array(mirrored)))
        torch.testing.assert_close(
            logits, model(pixels(images["train"]).flip(3)), atol=1e-5, rtol=0
        )
        assert not np.array_equal(augmented, plain)
        assert not np.array_equal(augmented, mirrored)
    assert [len(features[split].views) for split in ("val", "test")] == [1, 1]
    assert extractor.computed == 3 * len(plain) + len(features["val"].labels) + 70


def test_features_on_disk_are_not_computed_again(tmp_path):
    first, _ = extract(tmp_path, views=3)
    assert len(files(tmp_path)) == 5
    again, extractor = extract(tmp_path, views=3)
    assert extractor.computed == 0
    for split in first:
        np.testing.assert_array_equal(first[split].views, again[split].views)


def test_an_array_that_was_not_finished_is_computed_anew_and_no_other(tmp_path, monkeypatch):
    """The array of the validation images fails, after the two batches of training images."""
    before, _ = extract(tmp_path / "whole")
    calls = []
    compute = FeatureExtractor._features

    def failing(self, images):
        calls.append(images)
        if len(calls) == 3:
            raise OSError(errno.EIO, "it fails")
        return compute(self, images)

    monkeypatch.setattr(FeatureExtractor, "_features", failing)
    with pytest.raises(OSError, match="it fails"):
        extract(tmp_path / "kept")
    assert len(files(tmp_path / "kept")) == 1
    assert list((tmp_path / "kept").glob(".*")) == [], "no temporary file is left"
    after, extractor = extract(tmp_path / "kept")
    assert extractor.computed == len(after["val"].labels) + len(after["test"].labels)
    for split in before:
        np.testing.assert_array_equal(before[split].views, after[split].views)


def test_an_array_that_was_cut_short_is_computed_anew(tmp_path):
    extract(tmp_path)
    whole = files(tmp_path)
    path = max(tmp_path.glob("*.npy"), key=lambda path: path.stat().st_size)
    path.write_bytes(whole[path.name][:-100])
    _, extractor = extract(tmp_path)
    assert extractor.computed == len(extractor.data.images["train"])
    assert files(tmp_path) == whole


def test_a_full_disk_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(FeatureExtractor, "_features", lambda *_: pytest.fail("computed"))
    with pytest.raises(OSError, match=r"No space left on device: .*/features-[0-9a-f]{32}\.npy"):
        extract(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"train_images": 301},
        {"task": "upstream"},
        {"precision": "bf16-mixed"},
    ],
)
def test_other_weights_images_or_precision_have_other_features(tmp_path, change):
    extract(tmp_path)
    before = set(files(tmp_path))
    _, extractor = extract(tmp_path, **change)
    assert set(files(tmp_path)) - before
    assert extractor.computed >= 200


def test_networks_with_the_same_weights_but_another_architecture_share_no_features():
    """torchvision and timm have the same names of weights in ResNets."""
    pytest.importorskip("timm", reason="timm is an optional extra")
    one = untrained("resnet18", 32)
    other = untrained("timm/resnet18", 32)
    other.network.load_state_dict(one.network.state_dict())
    assert one.geometry == other.geometry
    assert extraction._fingerprint(one) != extraction._fingerprint(other)


def test_features_are_as_precise_as_the_trainer(tmp_path):
    exact, _ = extract(tmp_path)
    rounded, _ = extract(tmp_path, precision="bf16-mixed")
    assert len(files(tmp_path)) == 6
    for split in exact:
        difference = np.abs(exact[split].views[0] - rounded[split].views[0]).max()
        assert 0 < difference < 0.1 * np.abs(exact[split].views[0]).max()
    with pytest.raises(UserError, match=r"precision=bf16-true converts the weights .*: take"):
        extract(tmp_path, precision="bf16-true")


def test_old_features_make_room_and_nothing_else_is_removed(tmp_path):
    names = [f"features-{number:032x}.npy" for number in range(3)]
    others = ["features-mine.npy", "notes.npy"]
    for number, name in enumerate([*names, *others]):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (number, number))
    used = FeatureFile(tmp_path / names[0], 5, 25)  # 500 bytes
    make_room(tmp_path, [used], limit_gb=1.6e-6)
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2], *others}
    make_room(tmp_path, [FeatureFile(tmp_path / "new", 5, 25)], limit_gb=1.6e-6)
    assert {path.name for path in tmp_path.iterdir()} == {names[0], *others}, "used just now"
    with pytest.raises(UserError, match=r"0\.0 GB in .*more than limit_gb=1e-07: raise it"):
        make_room(tmp_path, [used], limit_gb=1e-7)


@pytest.fixture
def drawn(monkeypatch):
    """Features of four classes of unequal size, read in blocks of seven images."""
    monkeypatch.setattr(standardise, "BLOCK_IMAGES", 7)
    rng = np.random.default_rng(0)
    scales = [1, 10, 0.1, 1, 1, 1]
    centres = 0.7 * rng.normal(size=(4, 6)) * scales

    def draw(count):
        labels = np.sort(rng.choice(4, count, p=[0.4, 0.3, 0.2, 0.1]))
        values = centres[labels] + rng.normal(size=(count, 6)) * scales + 3
        return Features([values.astype(np.float32)], labels)

    return draw(93), draw(40), draw(50)


def test_logistic_regression_is_at_its_minimum(drawn):
    train, val, _ = drawn
    mean, divisor = standardisation = fit_standardisation(train)
    values = torch.from_numpy(train.views[0])
    torch.testing.assert_close(mean, values.mean(0))
    head, penalty = logistic.fit_logistic(train, val, 4, standardisation, (0.1,))
    assert penalty == 0.1
    logits = head.logits(train).requires_grad_()
    weight = head.weight * divisor
    loss = F.cross_entropy(logits, torch.from_numpy(train.labels))
    (errors,) = torch.autograd.grad(loss, logits)
    gradient = errors.T @ ((values - mean) / divisor) + 0.1 * weight
    assert gradient.norm() <= 0.1 * logistic.WEIGHT_TOLERANCE * weight.norm()
    assert errors.sum(0).norm() <= 0.1 * logistic.WEIGHT_TOLERANCE * weight.norm()
    assert logistic.accuracy(logits, train.labels) > 0.6


def draw_correlated(count, width, seed=0):
    """Features of three classes, most of whose variance is in a few directions."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 1e-3, width)[:, None]
    values = (rng.normal(size=(count, width)) + rng.normal(size=(3, width))[labels]) @ mixing
    return Features([values.astype(np.float32)], labels)


def newton_probabilities(train, penalty, standardisation):
    """Probabilities of the training images by Newton's method in float64, to the last digits."""
    ((values, labels),) = standardise.standardised(train.views, train.labels, standardisation)
    values = values.double()
    width = values.shape[1]
    flat = torch.zeros(3 * (width + 1), dtype=torch.float64)

    def logits(flat):
        weights, biases = flat.split((3 * width, 3))
        return values @ weights.view(3, width).T + biases

    def loss(flat):
        penalised = penalty / 2 * flat[: 3 * width].square().sum()
        return F.cross_entropy(logits(flat), labels) + penalised

    ridge = 1e-12 * torch.eye(len(flat))  # the same added to all biases changes nothing
    for _ in range(100):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        if gradient.norm() < 1e-12:
            break
        hessian = torch.autograd.functional.hessian(loss, flat)
        step = torch.linalg.solve(hessian + ridge, gradient)
        size = 1.0
        while loss(flat - size * step) > loss(flat) and size > 1e-9:
            size /= 2
        flat = flat - size * step
    assert gradient.norm() < 1e-9
    return logits(flat).softmax(1)


@pytest.mark.parametrize(("count", "width"), [(300, 30), (15, 30)], ids=["all", "few shots"])
@pytest.mark.parametrize("number", [0, -1], ids=["strongest", "weakest"])
def test_logistic_regression_has_the_probabilities_of_newtons_method(
    count, width, number, monkeypatch
):
    """All penalties are tried, and this one is made to seem the best."""
    train = draw_correlated(count, width)
    standardisation = fit_standardisation(train)
    accuracies = [0.0] * len(logistic.PENALTIES)
    accuracies[number] = 1.0
    monkeypatch.setattr(logistic, "accuracy", lambda *_: accuracies.pop(0))
    head, penalty = logistic.fit_logistic(train, train, 3, standardisation)
    assert penalty == logistic.PENALTIES[number]
    probabilities = head.logits(train).softmax(1).double()
    expected = newton_probabilities(train, penalty, standardisation)
    torch.testing.assert_close(probabilities, expected, atol=0.01, rtol=0)


def test_logistic_regression_that_has_not_converged_says_so(monkeypatch):
    monkeypatch.setattr(logistic, "MAX_CHECKS", 1)
    monkeypatch.setattr(logistic, "ITERATIONS_PER_CHECK", 2)
    train = draw_correlated(120, 20)
    with pytest.warns(UserWarning, match=r"has not converged with the penalty 0\.001, 0\.0001: "):
        logistic.fit_logistic(train, train, 3, fit_standardisation(train), (1e-3, 1e-4))


def test_a_class_without_training_images_is_never_likely():
    train = draw_correlated(60, 8)
    head, _ = logistic.fit_logistic(train, train, 4, fit_standardisation(train))
    assert head.logits(train).softmax(1)[:, 3].max() < 0.01


def test_features_that_do_not_fit_into_memory_give_the_same_head(drawn, monkeypatch):
    train, val, _ = drawn
    standardisation = fit_standardisation(train)
    cached, _ = logistic.fit_logistic(train, val, 4, standardisation)
    monkeypatch.setattr(logistic, "MAX_CACHED_BYTES", 0)
    read_again, _ = logistic.fit_logistic(train, val, 4, standardisation)
    torch.testing.assert_close(cached, read_again, atol=0, rtol=0)


def with_feature(features, column):
    """The same features and one more, the last."""
    column = np.asarray(column, np.float32)[:, None]
    return Features([np.hstack([features.views[0], column])], features.labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "constant",
    [
        pytest.param(0.0, marks=pytest.mark.whole),
        0.1,
        pytest.param(1000.0, marks=pytest.mark.whole),
    ],
)
def test_a_feature_that_is_constant_in_training_changes_nothing(drawn, constant):
    """Rounding makes it vary a little, and test images have other values."""
    train, val, test = drawn
    rng = np.random.default_rng(0)
    rounding = rng.choice([1, 1 + 1e-7], len(train.labels))
    others = {}
    for name, features in (("val", val), ("test", test)):
        others[name] = with_feature(features, rng.normal(constant, 1, len(features.labels)))
    train_and_one = with_feature(train, constant * rounding)
    plain_head, plain = heads.evaluate_heads({"train": train, "val": val, "test": test}, 4)
    head, scores = heads.evaluate_heads({"train": train_and_one, **others}, 4)
    assert head.weight[:, -1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(head.weight[:, :-1], plain_head.weight, atol=1e-4, rtol=1e-3)
    assert scores._replace(width=6) == plain


def test_features_that_are_all_constant_tell_nothing():
    train = Features([np.full((8, 5), 3, np.float32)], np.arange(8) % 2)
    head, _ = logistic.fit_logistic(train, train, 2, fit_standardisation(train))
    assert head.weight.abs().max() == 0
    torch.testing.assert_close(head.logits(train).softmax(1), torch.full((8, 2), 0.5))


@pytest.mark.parametrize("num_rare", [1, 60], ids=["one of them", "most of them"])
def test_features_that_are_nearly_always_zero_get_no_large_weights(drawn, num_rare):
    """A small network on small images has many: they are not 0 in one image of fifty."""
    train, val, _ = drawn
    rng = np.random.default_rng(0)
    for _ in range(num_rare):
        train = with_feature(train, 1e-4 * (rng.random(len(train.labels)) < 0.02))
        val = with_feature(val, np.zeros(len(val.labels)))
    head, _ = logistic.fit_logistic(train, val, 4, fit_standardisation(train))
    largest = head.weight[:, :6].abs().max()
    assert head.weight[:, 6:].abs().max() < 10 * largest


def test_the_penalty_is_the_best_on_the_validation_images(drawn):
    train, val, _ = drawn
    standardisation = fit_standardisation(train)
    head, best_penalty = logistic.fit_logistic(train, val, 4, standardisation)
    accuracies = []
    for penalty in logistic.PENALTIES:
        alone, _ = logistic.fit_logistic(train, val, 4, standardisation, (penalty,))
        accuracies.append(logistic.accuracy(alone.logits(val), val.labels))
        if penalty == best_penalty:
            torch.testing.assert_close(alone.logits(val), head.logits(val), atol=0.05, rtol=0)
    accuracy = logistic.accuracy(head.logits(val), val.labels)
    assert accuracy == pytest.approx(max(accuracies), abs=0.03)


def test_neighbours_and_means_are_those_of_plain_loops(drawn):
    train, _, test = drawn
    mean, divisor = standardisation = fit_standardisation(train)
    votes = heads.nearest_neighbours(train, test, 4, standardisation)
    scores = heads.nearest_mean(train, test, 4, standardisation)
    train_points = (train.views[0] - mean.numpy()) / divisor.numpy()
    test_points = (test.views[0] - mean.numpy()) / divisor.numpy()
    means = np.stack([train_points[train.labels == label].mean(0) for label in range(4)])
    for row, point in enumerate(test_points):
        assert scores[row].argmax() == np.square(means - point).sum(1).argmin()
        cosines = train_points @ point / np.linalg.norm(train_points, axis=1)
        cosines /= np.linalg.norm(point)
        order = np.argsort(-cosines)
        for count in heads.NEIGHBOURS:
            labels = train.labels[order[:count]]
            counts = np.bincount(labels, minlength=4)
            sums = np.bincount(labels, cosines[order[:count]], minlength=4)
            winner = max(range(4), key=lambda label: (counts[label], sums[label]))
            assert votes[count][row].argmax() == winner


def test_balanced_accuracy_is_the_mean_of_the_classes_with_images():
    logits = torch.eye(3)[[0, 0, 1, 0]]
    labels = np.array([0, 0, 0, 1])
    assert heads.balanced_accuracy(logits, labels, 3) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.slow
def test_few_shots_draw_as_many_images_of_each_class(drawn, monkeypatch):
    train, val, test = drawn
    samples = []

    def noted(sample, *rest):
        samples.append(sample)
        return logistic.fit_logistic(sample, *rest)

    monkeypatch.setattr(heads, "fit_logistic", noted)
    accuracies = heads.few_shot(train, val, test, 4, fit_standardisation(train))
    least = np.bincount(train.labels).min()
    assert list(accuracies) == [str(shots) for shots in heads.SHOTS if shots <= least]
    assert len(accuracies) > 1
    for number, sample in enumerate(samples):
        shots = heads.SHOTS[number // heads.NUM_DRAWS]
        assert set(np.bincount(sample.labels)) == {shots}
    assert len({sample.views[0].tobytes() for sample in samples}) == len(samples)


def test_each_seed_draws_other_few_images(drawn, monkeypatch):
    train, val, test = drawn
    samples = []

    def noted(sample, *rest):
        samples.append(sample.views[0].tobytes())
        return logistic.LinearHead(torch.zeros(4, 6), torch.zeros(4)), 1.0

    monkeypatch.setattr(heads, "fit_logistic", noted)
    for seed in (0, 1):
        heads.few_shot(train, val, test, 4, fit_standardisation(train), seed)
    assert len(samples) >= 4 * heads.NUM_DRAWS
    assert len(set(samples)) == len(samples)


def test_features_that_are_not_finite_are_refused(drawn):
    train, _, _ = drawn
    values = train.views[0].copy()
    values[3, 2] = np.inf
    with pytest.raises(UserError, match="are NaN or infinite: take other weights"):
        fit_standardisation(train._replace(views=[values]))


def random_head(width):
    return logistic.LinearHead(torch.randn(10, width), torch.randn(10))


@pytest.mark.parametrize(
    ("network", "size"),
    [(NETWORK, 64), ("timm/deit_tiny_distilled_patch16_224", 32)],
    ids=["one head", "two heads"],
)
def test_a_network_gives_the_logits_of_its_new_head(network, size):
    if network.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    model = untrained(network, size)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    head = random_head(model.network.get_submodule(model.heads[0]).in_features)
    set_head(model, head, images)
    with torch.inference_mode(), model.features() as passes:
        logits = model(images / 255)
        expected = passes[0] @ head.weight.T + head.bias
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_network_that_does_more_with_its_logits_is_refused():
    model = untrained(NETWORK, 64)
    model.network.fc.register_forward_hook(lambda module, inputs, logits: logits.relu())
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with pytest.raises(UserError, match="does more with its head's logits"):
        set_head(model, random_head(1024), images)


def test_a_head_that_is_not_linear_is_refused(tmp_path):
    model = untrained("squeezenet1_1", 32)
    with pytest.raises(
        UserError, match="squeezenet1_1 cannot be probed, because its head is no linear layer"
    ):
        FeatureExtractor(model, ShapesDataModule(), tmp_path)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A folder in which one backbone was probed, and another one could not be.

    A recipe for training may limit the batches. All images are probed all the same.
    """
    folder = tmp_path_factory.mktemp("probe")
    backbones = [f"{NETWORK}=none", "squeezenet1_1=none"]
    done = run_fit(folder, *backbones, *PROBE_OPTIONS, command="probe", expect=1)
    return folder, done


SEEDED = ["--model.image_size=32", "--features=kept", *TINY[2:]]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """A folder in which a backbone was probed with three seeds, and what was printed.

    Before that, it was probed with the first of them alone.
    """
    folder = tmp_path_factory.mktemp("seeds")
    torch.manual_seed(0)
    network = TransferClassifier("lenet5", "none").network
    torch.save(network.state_dict(), folder / "w.pth")
    run_fit(folder, "lenet5=w.pth", *SEEDED, command="probe")
    alone = json.loads(next(folder.glob("lightning_logs/probe/*/result.json")).read_text())
    done = run_fit(folder, "lenet5=w.pth", *SEEDED, "--seeds=3", command="probe")
    return folder, alone, done


def results_of_seeds(folder):
    (path,) = folder.glob("lightning_logs/probe/*/result.json")
    content = json.loads(path.read_text())
    others = content.pop("other_seeds")
    return [content, *others]


def test_seeds_share_the_features(seeded):
    folder, alone, _ = seeded
    assert alone["computed"] == 250
    results = results_of_seeds(folder)
    assert [result["computed"] for result in results] == [0, 0, 0]
    assert len(files(folder / "kept")) == 3
    figures = {(result["val"], result["test"], result["nearest_mean"]) for result in results}
    assert len(figures) == 3, "each seed splits the images anew"


def test_the_first_seed_is_that_of_a_probe_without_seeds(seeded):
    folder, alone, _ = seeded
    first = results_of_seeds(folder)[0]
    alone = without_times(alone) | {"computed": 0}
    del alone["other_seeds"]
    assert without_times(first) == alone


def test_the_tables_of_seeds_have_intervals(seeded):
    folder, _, done = seeded
    results = results_of_seeds(folder)
    interval = mean_interval([100 * result["test"] for result in results])
    row = next(line for line in done.stdout.splitlines() if line.startswith("| lenet5"))
    assert f" {interval.text(2)} " in row
    assert "over 3 seeds" in done.stdout
    out = folder / "lightning_logs" / "probe"
    assert "over 3 seeds" in (out / "probe.md").read_text()
    with (out / "probe.csv").open(newline="") as file:
        cells = next(csv.DictReader(file))
    assert cells["seeds"] == "3"
    assert cells["test (%)"] == f"{interval.mean:.2f}"
    assert cells["test (%): deviation"] == f"{interval.deviation:.2f}"
    with (out / "probe-runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert [row["val (%)"] for row in rows] == [f"{100 * result['val']:.2f}" for result in results]


def test_views_of_seeds_are_those_of_any_training_image(tmp_path):
    """Validation images of the first seed are trained on with another, mirrored too."""
    _, extractor = extract(tmp_path / "one", views=2)
    data = extractor.data
    trainer = quiet_trainer(use_distributed_sampler=False)
    both = FeatureExtractor(
        extractor.classifier, data, tmp_path / "one", 2, 1.0, splits_with_views=["train", "val"]
    )
    features = both.compute(trainer)
    assert both.computed == len(data.images["val"]), "their mirror images"
    rows = data.rows_with_seed(1)
    anew = extraction.split_anew(features, rows)
    with torch.inference_mode():
        images = torch.cat([pixels(data.images["train"]), pixels(data.images["val"])])
        mirrored = images[torch.from_numpy(rows["train"])].flip(3)
        logits = extractor.classifier.network.fc(torch.from_numpy(anew["train"].views[1][:]))
        torch.testing.assert_close(logits, extractor.classifier(mirrored), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"leave_out": "list.csv", "leave_out_splits": list(SPLITS)}]
)
def test_rows_with_a_seed_are_the_images_of_a_run_with_it(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "train", 30)
    (tmp_path / "list.csv").write_text(
        "\n".join(["image", "train/cat/001.png", "train/dog/002.png"])
    )

    def set_up(seed):
        data = ImageFolderDataModule(root=str(tmp_path), val_fraction=0.3, seed=seed, **options)
        data.prepare_data()
        data.setup()
        return data

    data = set_up(0)
    other = set_up(1)
    rows = data.rows_with_seed(1)
    names = [*data.names_of_images("train"), *data.names_of_images("val")]
    for split in ("train", "val"):
        assert [names[row] for row in rows[split]] == other.names_of_images(split)
        assert other.names_of_images(split) != data.names_of_images(split)
    assert len(names) == (58 if options else 60)


@pytest.mark.parametrize("index", [slice(2, 5), slice(0, 100), np.array([3, 0, 3])])
def test_chosen_rows_are_those_of_the_arrays_one_after_the_other(index):
    arrays = [np.arange(8, dtype=np.float32).reshape(4, 2), np.full((3, 2), 9, np.float32)]
    rows = np.array([6, 0, 4, 3, 1])
    chosen = ChosenRows(arrays, rows)
    array = np.concatenate(arrays)[rows]
    assert len(chosen) == 5
    assert chosen.shape == array.shape
    np.testing.assert_array_equal(chosen[index], array[index])


def probed_network(label, *tests):
    """A network with an accuracy on the test images for each seed."""
    results = []
    for seed, test in enumerate(tests):
        neighbours = dict.fromkeys(("1", "5", "20"), 0.5)
        scores = {"balanced_accuracy": 0.5, "nearest_mean": 0.5, "nearest_neighbours": neighbours}
        result = ProbeResult(
            **{"label": label, "seed": seed, "val": 0.5, "test": test, "few_shot": {}, **scores},
            **{"penalty": 1.0, "width": 2, "images_per_class": 9, "precision": "32-true"},
            **{"computed": 0, "feature_seconds": 1.0, "head_seconds": 1.0},
        )
        results.append(result)
    return ProbedNetwork(results)


def test_differences_are_taken_seed_by_seed_to_the_best_network():
    best = probed_network("best", 0.70, 0.80, 0.90)
    other = probed_network("other", 0.69, 0.79, 0.89, 0.10)
    heading, first, second = probe_table.short_table([other, best], [])
    column = heading.index("difference (points)")
    assert first[:2] == ["best", "80.00 ± 24.84"]
    assert first[column] == ""
    assert second[column] == "-1.00 ± 0.00", "the fourth seed has no other"
    rows = probe_table.numbers_table([other, best], ["gone"])
    column = rows[0].index("difference (points): from")
    assert [row[column] for row in rows[1:]] == ["", "-1.00", ""]


def test_without_test_images_seeds_are_compared_by_validation():
    one = probed_network("one", None, None)
    heading, row = probe_table.short_table([one], [])
    assert row[heading.index("test (%)")] == ""
    assert row[heading.index("val (%)")].startswith("50.00")
    assert heading[-1] == "features (s)", "one network has no difference"
    assert len(probe_table.full_table([one], [])[1]) == len(probe_table.full_table([one], [])[0])


@pytest.mark.filterwarnings("ignore:val_fraction=0")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--seeds=0"], "--seeds is 0: take 1 to 1000"),
        (["--seeds=many"], "--seeds"),
        (["--seeds=2", "--seed_everything=1"], "probe sets the seeds itself"),
        (["--seeds=2", "--data.val_fraction=0"], "none are: validation uses test images"),
        (["--seeds=2", "--data.leave_out=LIST"], r"leave_out_splits=\[train,val\]"),
    ],
)
def test_seeds_that_make_no_sense_are_refused(tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FeatureExtractor, "_features", lambda *_: pytest.fail("computed"))
    data = ShapesDataModule(train_images=200, test_images=50)
    data.setup()
    (tmp_path / "list.csv").write_text("\n".join(["image", *data.names["train"][:9]]))
    options = [option.replace("LIST", "list.csv") for option in options]
    with pytest.raises(UserError, match=match):
        probe.main([f"{NETWORK}=none", *options, "--features=kept", *TINY[2:]])
    assert not (tmp_path / "lightning_logs").exists()


def read_result(folder):
    return json.loads((folder / PROBED / "result.json").read_text())


def without_times(result):
    return {name: value for name, value in result.items() if not name.endswith("seconds")}


@pytest.mark.slow
def test_the_checkpoint_has_the_accuracy_of_the_probe(probed, monkeypatch):
    folder, done = probed
    monkeypatch.chdir(folder)
    result = read_result(folder)
    assert result["computed"] == 250
    for split in ("val", "test"):
        scores = evaluate(CHECKPOINT, split, accelerator="cpu", figures=False)
        assert scores[f"{split}/acc"] == pytest.approx(result[split], abs=1e-7)
    images = ShapesDataModule(train_images=200, test_images=50).load("test")
    classifier = Classifier.load(CHECKPOINT, "cpu")
    predictions = classifier.predict(list(torch.from_numpy(images.pixels(np.arange(50)))))
    predicted = [classifier.class_names.index(classes[0][0]) for classes in predictions]
    assert np.mean(predicted == images.labels) == pytest.approx(result["test"], abs=1e-7)
    assert f"{100 * result['test']:.2f}" in done.stdout
    assert CHECKPOINT in done.stdout


def test_a_backbone_that_fails_loses_no_other(probed):
    folder, done = probed
    assert "squeezenet1_1 cannot be probed" in done.stderr
    lines = (folder / "lightning_logs/probe/probe.md").read_text().splitlines()
    assert len(lines) == 4
    assert NETWORK in lines[2]
    assert "squeezenet1_1, from scratch: failed" in lines[3]
    assert (folder / "lightning_logs/probe/probe.png").stat().st_size > 5000


def test_the_table_has_the_figures_of_the_result(probed):
    folder, done = probed
    result = read_result(folder)
    with (folder / "lightning_logs/probe/probe-runs.csv").open(newline="") as file:
        cells = next(csv.DictReader(file))
    assert cells["network"] == result["label"]
    assert cells["20-nearest (%)"] == f"{100 * result['nearest_neighbours']['20']:.2f}"
    assert cells["balanced (%)"] == f"{100 * result['balanced_accuracy']:.2f}"
    assert cells["5-shot (%)"].startswith(f"{100 * np.mean(result['few_shot']['5']):.1f} ± ")
    assert cells["50-shot (%)"] == "", "no class has so many images"
    assert cells["features"] == "1024"
    short_table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(short_table) == 4
    assert max(map(len, short_table)) < 80, "it fits into a terminal"


def test_another_recipe_needs_another_folder(probed, tmp_path, monkeypatch):
    folder, _ = probed
    shutil.copytree(folder / "lightning_logs", tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    options = [f"{NETWORK}=none", *PROBE_OPTIONS]
    message = r"holds results of .* \(recipe\.json\): name another folder with --out"
    with untouched(tmp_path), pytest.raises(UserError, match=message):
        probe.main([*options, "--data.batch_size=8"])
    # Another file of weights with the same name.
    recipe = tmp_path / PROBED / "recipe.json"
    recipe.write_text('{"options": ["--model.weights=another/w.pth"]}')
    with untouched(tmp_path), pytest.raises(UserError, match=f"{BACKBONE_FOLDER} {message}"):
        probe.main(options)


@pytest.mark.slow
def test_the_same_recipe_adds_to_the_table(probed, tmp_path):
    folder, _ = probed
    shutil.copytree(folder / "lightning_logs", tmp_path / "lightning_logs")
    done = run_fit(tmp_path, "shufflenet_v2_x1_0=none", *PROBE_OPTIONS, command="probe")
    lines = (tmp_path / "lightning_logs/probe/probe.md").read_text().splitlines()
    labels = {line.split(",")[0].strip("| ") for line in lines[2:]}
    assert labels == {NETWORK, "shufflenet_v2_x1_0"}
    assert done.stdout.count("best.ckpt") == 2


@pytest.mark.slow
def test_two_processes_compute_the_same_features(probed, tmp_path):
    folder, _ = probed
    run_fit(tmp_path, f"{NETWORK}=none", *PROBE_OPTIONS, "--trainer.devices=2", command="probe")
    assert len(files(tmp_path / "kept")) == 3
    assert files(tmp_path / "kept") == files(folder / "kept")
    assert without_times(read_result(tmp_path)) == without_times(read_result(folder))


@pytest.mark.parametrize("option", ["--resume", "--ckpt_path"])
def test_options_that_continue_a_run_are_refused(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    with untouched(tmp_path), pytest.raises(UserError, match=f"{option} is for fit: leave it out"):
        probe.main([f"{NETWORK}=none", f"{option}=run", *TINY[2:]])


@pytest.mark.slow
def test_fit_goes_on_from_the_head_of_the_probe(probed, tmp_path):
    folder, _ = probed
    learns_nothing = [
        "--model.lr=1e-30",
        "--freeze.unfreeze_epoch=0",
        "--trainer.max_epochs=1",
        "--model.image_size=64",
    ]
    run_fit(tmp_path, *TINY, f"--model.weights={folder / CHECKPOINT}", *learns_nothing)
    before = weights(folder / CHECKPOINT)
    after = weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    for layer in ("fc.weight", "conv5.0.weight"):
        torch.testing.assert_close(layer_of(after, layer), layer_of(before, layer))


def layer_of(state, name):
    """The only entry of a state dict whose name ends so."""
    (value,) = [value for key, value in state.items() if key.endswith(f"network.{name}")]
    return value


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--features=FILE"], "--features .* cannot be made a folder"),
        (["--out=FILE"], ".* is no folder: name another place with --out=FOLDER"),
        (["--limit_gb=nan"], "--limit_gb is nan: take a positive number"),
        (["--trainer.precision=bf16-true"], "precision=bf16-true converts the weights"),
        (["--trainer.strategy=ddp_spawn"], "strategy=ddp_spawn starts processes that end"),
        ([f"{NETWORK}=none"], "Two of the backbones have one name"),
    ],
)
def test_a_mistake_is_refused_before_features_are_computed(tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(FeatureExtractor, "_features", lambda *_: pytest.fail("computed"))
    (tmp_path / "file").touch()
    options = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    with pytest.raises(UserError, match=match):
        probe.main([f"{NETWORK}=none", *options, *TINY[2:]])


def fit_with_probe(folder, monkeypatch, state, *options):
    """A run of `freeze.probe` that learns nothing, from these weights but for the head."""
    backbone = {}
    for name, value in state.items():
        if ".fc." not in name:
            backbone[name.rpartition("network.")[2]] = value
    torch.save(backbone, folder / "backbone.pth")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    learns_nothing = ["--freeze.unfrozen_lr=1e-30", "--trainer.max_epochs=1"]
    return run_fit(
        folder,
        *TINY,
        "--model.image_size=64",
        "--model.weights=backbone.pth",
        "--freeze.probe=true",
        *learns_nothing,
        *options,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.devices=1"], "Epoch 1: everything at rate 1e-30"),
        pytest.param(
            ["--trainer.devices=2"],
            "Epoch 1: everything at rate 1e-30",
            marks=pytest.mark.whole,
        ),
        (["--freeze.unfreeze_epoch=0", "--model.lr=1e-30"], "Epoch 1: everything, "),
    ],
    ids=["one process", "two", "never frozen"],
)
def test_a_fit_may_begin_with_the_head_of_the_probe(
    probed, tmp_path, monkeypatch, options, message
):
    folder, _ = probed
    before = weights(folder / CHECKPOINT)
    done = fit_with_probe(tmp_path, monkeypatch, before, *options)
    assert message in done.stdout
    after = weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    for layer in ("fc.weight", "conv5.0.weight"):
        torch.testing.assert_close(layer_of(after, layer), layer_of(before, layer))


@pytest.mark.slow
def test_a_resumed_fit_keeps_its_head(tmp_path, monkeypatch):
    state = TransferClassifier(NETWORK, weights="none").state_dict()
    fit_with_probe(tmp_path, monkeypatch, state)
    before = weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    shutil.rmtree(tmp_path / "cache")
    done = run_fit(tmp_path, f"--resume={RUN}", "--trainer.max_epochs=2")
    assert "Features of" not in done.stderr
    after = weights(tmp_path / RUN / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(layer_of(after, "fc.weight"), layer_of(before, "fc.weight"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            ["--freeze.phases=gradual"],
            "error: --freeze.probe=true is in place of the frozen epochs",
        ),
        ([], "error: .*probe=true needs a backbone that has learned something, not .*weights=none"),
    ],
)
def test_a_fit_that_cannot_begin_with_a_probe_is_refused(tmp_path, monkeypatch, options, match):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run_fit(tmp_path, *TINY, "--freeze.probe=true", *options, expect=2)
    assert re.search(match, done.stderr), done.stderr


def test_a_fit_in_half_precision_cannot_begin_with_a_probe(tmp_path):
    """The weights are those of a file, because a backbone without any is refused first."""
    torch.save(TransferClassifier(NETWORK, "none").network.state_dict(), tmp_path / "w.pth")
    options = ["--model.weights=w.pth", "--freeze.probe=true", "--trainer.precision=bf16-true"]
    done = run_fit(tmp_path, *TINY, *options, expect=2)
    assert re.search("error: .*precision=bf16-true converts the weights", done.stderr)
