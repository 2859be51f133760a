"""The temperature of a network: fitted on validation images, and never of any weight elsewhere."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, quiet_trainer, run_fit, untouched
from safetensors import safe_open

from cifar_transfer import Classifier, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.evaluate import evaluate
from cifar_transfer.commands.export import export
from cifar_transfer.commands.fit import fit
from cifar_transfer.inference.export_files import NOTES
from cifar_transfer.network.temperature import (
    MAX_TEMPERATURE,
    fit_temperature,
    nll,
    why_not_fitted,
)
from cifar_transfer.results.calibration import calibrate
from cifar_transfer.results.predictions import Predictions
from cifar_transfer.training import calibrate_checkpoint, run_checkpoints
from cifar_transfer.training.calibrate_checkpoint import write_temperature
from cifar_transfer.training.checkpoint_file import load_classifier, read_checkpoint
from cifar_transfer.training.evaluation import load_data
from cifar_transfer.training.loss import Teacher

TEMPERATURE = 2.7
JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--model.lr=0.003",
    "--data=ShapesDataModule",
    "--data.train_images=270",
    "--data.val_fraction=0.334",
    "--data.test_images=70",
    "--freeze.unfreeze_epoch=0",
    "--report.figures=false",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
]


def two_classes(logit, right, wrong):
    """Logits of two classes, of images that are all equally sure of the first one; and labels."""
    logits = torch.tensor([[logit, 0.0]]).repeat(right + wrong, 1)
    labels = (torch.arange(right + wrong) >= right).long()
    return logits, labels


def save_checkpoint(path, temperature, scale=20):
    """Write the checkpoint of a network with opinions, and its temperature."""
    torch.manual_seed(0)
    names = ShapesDataModule(train_images=20).class_names
    model = TransferClassifier("lenet5", "none", class_names=names)
    with torch.no_grad():
        model.network.get_submodule(model.heads[0]).weight.mul_(scale)
    model.classifier.set_geometry(replace(model.classifier.geometry, size=(32, 32)))
    model.classifier.set_temperature(temperature)
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def some_images(count=40):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same network without and with a temperature."""
    folder = tmp_path_factory.mktemp("temperature")
    plain = save_checkpoint(folder / "plain.ckpt", 1.0)
    return plain, save_checkpoint(folder / "warm.ckpt", TEMPERATURE)


@pytest.mark.parametrize(("logit", "right"), [(4.0, 90), (1.0, 90), (2.0, 61)])
def test_the_temperature_is_that_of_least_nll(logit, right):
    """With logits (a, 0), the NLL is least where sigmoid(a / T) is the share of right images."""
    logits, labels = two_classes(logit, right, 100 - right)
    share = right / 100
    expected = logit / math.log(share / (1 - share))
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-6)
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert nll(logits, labels, expected) == pytest.approx(entropy, rel=1e-6)
    calibration = calibrate(logits, labels)
    assert calibration.error_after == pytest.approx(0, abs=1e-6)
    before = abs(1 / (1 + math.exp(-logit)) - share)
    assert calibration.error_before == pytest.approx(before, abs=1e-6)
    text = f"{expected:.2f}: calibration error {100 * before:.1f} -> 0.0 % (validation)"
    assert str(calibration) == text


def test_a_temperature_is_bounded_and_not_fitted_where_nothing_can_be_said():
    assert fit_temperature(*two_classes(3.0, 10, 90)) == pytest.approx(MAX_TEMPERATURE, rel=1e-6)
    logits, labels = two_classes(3.0, 20, 0)
    assert why_not_fitted(logits, labels) == "no image is mistaken"
    assert calibrate(logits, labels).temperature == 1
    assert str(calibrate(logits, labels)) == "1, not fitted: no image is mistaken"
    logits[3, 0] = torch.nan
    assert "NaN or infinite" in why_not_fitted(logits, labels)
    logits, labels = two_classes(3.0, 20, 3)
    of_test = calibrate(logits, labels, are_test_images=True)
    assert str(of_test) == "1, not fitted: the validation images are the test images"
    few = calibrate(*two_classes(3.0, 10, 9))
    assert str(few) == "1, not fitted: there are fewer than 20 validation images"
    half = fit_temperature(logits.half(), labels)
    assert half == pytest.approx(fit_temperature(logits, labels), rel=1e-9), "fitted in float64"


def test_no_temperature_changes_a_prediction_not_even_of_nearly_equal_logits():
    """Division may round two different logits to one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 4, generator=generator)
    logits[:2000, 1] = torch.nextafter(logits[:2000, 0], torch.tensor(torch.inf))
    logits[:2000, 2:] -= 9
    logits[2000:3000, 3] = logits[2000:3000, 2]  # ties
    labels = torch.randint(4, (4000,), generator=generator)
    no_images = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    plain = Predictions(list("abcd"), labels, logits, torch.arange(0), no_images)
    merged = 0
    for temperature in (0.1, 0.7, 1.3, 3.0, 10.0):
        warm = plain.at_temperature(temperature)
        assert torch.equal(warm.predicted, plain.predicted)
        assert torch.equal(warm.correct, plain.correct)
        assert np.array_equal(warm.confusion(), plain.confusion())
        merged += int((warm.probabilities.argmax(1) != plain.predicted).sum())
    assert merged > 0, "this shows nothing"


@pytest.mark.parametrize("mirrored", [False, True])
def test_predictions_are_the_softmax_of_divided_logits_in_the_same_order(checkpoints, mirrored):
    images = some_images()
    plain, warm = (Classifier.load(path, "cpu", mirrored=mirrored) for path in checkpoints)
    before = plain.predict(list(images), top_k=10)
    after = warm.predict(list(images), top_k=10)
    assert [[name for name, _ in row] for row in before] == [
        [name for name, _ in row] for row in after
    ]
    shares = torch.tensor([[share for _, share in row] for row in before], dtype=torch.float64)
    expected = (shares.log() / TEMPERATURE).softmax(1)
    found = torch.tensor([[share for _, share in row] for row in after], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - shares).abs().max() > 0.05
    with torch.inference_mode():
        batch = TransferClassifier.load_from_checkpoint(checkpoints[1]).eval()
        step = batch.predict_step(images, 0)
    if not mirrored:
        torch.testing.assert_close(
            step.sort(descending=True).values, found.float(), atol=1e-5, rtol=0
        )


def test_training_and_teaching_know_no_temperature(checkpoints, tmp_path):
    warm = checkpoints[1]
    images = some_images() / 255
    logits = torch.randn(40, 10)
    losses = [Teacher(str(path), 10, None, None).loss(images, logits, 4.0) for path in checkpoints]
    assert torch.equal(*losses)
    data = ShapesDataModule(train_images=60, test_images=20)
    scores = []
    for path in checkpoints:
        model = TransferClassifier.load_from_checkpoint(path)
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
        scores.append(trainer.test(model, data, verbose=False))
    assert scores[0] == scores[1]
    assert model.classifier.temperature == TEMPERATURE
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert load_classifier(tmp_path / "after.ckpt").temperature == 1, "of weights that have changed"
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    quiet_trainer().test(model, data, ckpt_path=warm, verbose=False)
    assert model.classifier.temperature == TEMPERATURE


def test_graphs_divide_and_weights_say_by_what(checkpoints, tmp_path):
    plain, warm = map(load_classifier, checkpoints)
    images = some_images() / 255
    out = tmp_path / "x.pt2"
    assert export(str(checkpoints[1]), "torch_export", str(out)) < 1e-4
    extra_files = {NOTES: ""}
    network = torch.export.load(out, extra_files=extra_files).module()
    notes = json.loads(extra_files[NOTES])
    with torch.no_grad():
        torch.testing.assert_close(network(images), plain(images) / TEMPERATURE)
    assert notes["temperature"] == TEMPERATURE
    assert "divided by the temperature already" in notes["logits"]
    out = tmp_path / "x.safetensors"
    export(str(checkpoints[1]), "safetensors", str(out))
    with safe_open(out, "pt") as file:
        notes = file.metadata()
        for name, weight in plain.network.state_dict().items():
            assert torch.equal(file.get_tensor(name), weight), "the weights stay as they were"
    assert float(notes["temperature"]) == TEMPERATURE
    assert notes["logits"].startswith("Divide them by the temperature")
    assert warm.temperature == TEMPERATURE


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e3, "1", None, True])
def test_an_altered_temperature_is_refused(checkpoints, tmp_path, value):
    content = torch.load(checkpoints[0], weights_only=True)
    content["network"]["temperature"] = value
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="its temperature cannot be"):
        read_checkpoint(tmp_path / "x.ckpt")


def equal(one, other):
    """Whether two checkpoints hold the same, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.stride() == other.stride()
    if isinstance(one, dict):
        same_keys = list(one) == list(other)
        return same_keys and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_nothing_else_in_a_checkpoint_changes_and_a_failure_leaves_it(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path / "best.ckpt", 1.0)
    before = torch.load(path, weights_only=True)
    write_temperature(path, TEMPERATURE)
    after = torch.load(path, weights_only=True)
    assert after["state_dict"]._metadata == before["state_dict"]._metadata
    assert after["network"].pop("temperature") == TEMPERATURE
    assert before["network"].pop("temperature") == 1
    assert equal(before, after)

    def killed(checkpoint, file):
        file.write(b"the beginning")
        raise KeyboardInterrupt("killed")

    monkeypatch.setattr(run_checkpoints.torch, "save", killed)
    with untouched(tmp_path), pytest.raises(KeyboardInterrupt, match="killed"):
        write_temperature(path, 1.5)
    write_temperature(path, TEMPERATURE)  # nothing to write


def test_a_run_fits_it_to_its_validation_images_for_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best = fit(JOB).best
    said = capsys.readouterr().out
    checkpoint = read_checkpoint(best)
    temperature = checkpoint["network"]["temperature"]
    last = read_checkpoint(Path(RUN, "checkpoints/last.ckpt"))
    assert last["network"]["temperature"] == 1
    data = load_data(checkpoint)
    data.setup()
    pixels, labels = data.images["val"].__getitems__(range(len(data.images["val"])))
    with torch.inference_mode():
        logits = load_classifier(best)(pixels)
    assert temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-3)
    assert temperature != 1
    assert f"\ntemperature    {calibrate(logits, labels)}\n" in said
    before = best.read_bytes()
    scores = evaluate(str(best), "val", accelerator="cpu", figures=False)
    assert fit([f"--resume={RUN}"]).scores["best/val_acc"] == scores["val/acc"]
    assert best.read_bytes() == before, "a run that is over stays as it is"
    fit([f"--resume={RUN}", "--trainer.max_epochs=2"])
    assert read_checkpoint(best)["network"]["temperature"] != 1


def test_a_run_that_is_killed_before_it_has_its_temperature_gets_it_when_resumed(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def killed(path, temperature):
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_checkpoint, "write_temperature", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            fit(JOB)
    best = Path(RUN, "checkpoints/best.ckpt")
    assert load_classifier(best).temperature == 1
    assert fit([f"--resume={RUN}"]).best == best
    assert load_classifier(best).temperature != 1


@pytest.mark.filterwarnings("ignore:val_fraction=0")
def test_a_run_that_validates_on_the_test_images_fits_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best = fit([*JOB, "--data.val_fraction=0"]).best
    said = capsys.readouterr().out
    assert "temperature    1, not fitted: the validation images are the test images\n" in said
    assert read_checkpoint(best)["network"]["temperature"] == 1


@pytest.mark.whole
def test_two_processes_fit_what_one_would(tmp_path):
    options = [*JOB, "--trainer.devices=2", "--trainer.strategy=ddp", "--model.ema=0.9"]
    done = run_fit(tmp_path, *options, "--trainer.precision=bf16-mixed")
    best = tmp_path / RUN / "checkpoints/best.ckpt"
    checkpoint = read_checkpoint(best)
    data = load_data(checkpoint)
    data.setup()
    pixels, labels = data.images["val"].__getitems__(range(len(data.images["val"])))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = load_classifier(best)(pixels)
    temperature = checkpoint["network"]["temperature"]
    assert temperature == pytest.approx(fit_temperature(logits, labels), rel=0.02)
    assert done.stdout.count("\ntemperature  ") == 1


@pytest.mark.slow
def test_a_probe_fits_it_to_its_validation_images(tmp_path):
    options = [option for option in TINY if not option.startswith(("--model.backbone", "--report"))]
    done = run_fit(
        tmp_path,
        "lenet5=none",
        "--features=features",
        *options,
        command="probe",
    )
    (best,) = tmp_path.glob("lightning_logs/probe/*/checkpoints/best.ckpt")
    temperature = read_checkpoint(best)["network"]["temperature"]
    assert temperature != 1
    assert f"temperature {temperature:.2f}: calibration error " in done.stdout + done.stderr
