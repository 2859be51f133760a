"""Losses that are NaN or infinite, and a head that learns nothing from a frozen backbone."""

import warnings

import numpy as np
import pytest
import torch
from conftest import quiet_trainer, weights
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from cifar_transfer import (
    ArrayImages,
    Augment,
    BackboneFreeze,
    ImageDataModule,
    ShapesDataModule,
    TransferClassifier,
)
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.fit import fit
from cifar_transfer.training.loss import LossOptions, TrainingLoss
from cifar_transfer.training.loss_guard import (
    MAX_SCALED_OVERFLOWS,
    LossGuard,
    blind_loss,
    has_learned_nothing,
)

LENET = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--data=ShapesDataModule",
    "--data.train_images=200",
    "--data.test_images=50",
    "--data.batch_size=30",
    "--trainer.accelerator=cpu",
    "--report.figures=false",
    "--freeze.unfreeze_epoch=0",
]
CHECKPOINTS = "lightning_logs/version_0/checkpoints"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoints_whole(
    tmp_path, monkeypatch, value
):
    """In the second of six steps of an epoch: no line of the log and no end of an epoch is near."""
    monkeypatch.chdir(tmp_path)
    real = TransferClassifier.training_step

    def training_step(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        return loss * value if self.global_step == 13 else loss

    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    words = r"training loss of step 13 is NaN or infinite \(epoch 3, learning rate 0.002\)"
    with pytest.raises(UserError, match=words):
        fit([*LENET, "--trainer.max_epochs=5", "--model.lr=2e-3"])
    for name in ("best", "last"):
        path = f"{CHECKPOINTS}/{name}.ckpt"
        assert torch.load(path, weights_only=True)["epoch"] <= 1
        assert all(tensor.isfinite().all() for tensor in weights(path).values())
    monkeypatch.setattr(TransferClassifier, "training_step", real)
    outcome = fit(["--resume=lightning_logs/version_0"])
    assert outcome.scores["best/test_acc"] > 0, "and the run continues"


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = TransferClassifier.validation_step

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        if self.current_epoch == 1:
            images = images * torch.nan
        return real(self, (images, labels), batch_idx)

    monkeypatch.setattr(TransferClassifier, "validation_step", validation_step)
    with pytest.raises(UserError, match="validation loss of epoch 2 is NaN or infinite"):
        fit([*LENET, "--trainer.max_epochs=3"])
    assert torch.load(f"{CHECKPOINTS}/last.ckpt", weights_only=True)["epoch"] == 0


class Overflow(Callback):
    """Losses of the first steps that are NaN, as an overflow in half precision makes them."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step <= self.steps:
            outputs["loss"] = outputs["loss"] * torch.nan


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, False])
def test_the_gradient_scaler_may_skip_some_steps(tmp_path, monkeypatch, scaled):
    """Its scale is far too high at first, so that gradients overflow, and so do some losses."""
    monkeypatch.chdir(tmp_path)
    data = ShapesDataModule(train_images=400, test_images=50, batch_size=10)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)

    def trainer(overflows):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
        return quiet_trainer(
            max_epochs=1, plugins=plugins, callbacks=[Overflow(overflows), LossGuard()]
        )

    most = 1
    if scaled:
        most = MAX_SCALED_OVERFLOWS
        trainer(most - 1).fit(model, data)
        assert all(value.isfinite().all() for value in model.state_dict().values())
    with pytest.raises(UserError, match="training loss of step 0 is NaN or infinite"):
        trainer(most).fit(model, data)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [True, False])
def test_a_head_that_learns_nothing_is_warned_of(tmp_path, monkeypatch, dead):
    monkeypatch.chdir(tmp_path)
    fit([*LENET, "--trainer.max_epochs=10", "--model.lr=3e-3"])
    state = {
        name.removeprefix("classifier.network."): value * (not dead)
        for name, value in weights(f"{CHECKPOINTS}/last.ckpt").items()
    }
    torch.save(state, "w.pth")
    options = [
        "--model.weights=w.pth",
        "--freeze.unfreeze_epoch=2",
        "--trainer.max_epochs=3",
        "--data.batch_size=2",
        "--model.lr=3e-3",
    ]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit([*LENET, *options])
    assert any("has learned nothing" in str(warning.message) for warning in seen) == dead


SHARES = np.array([0.5, 0.3, 0.0, 0.2])  # no image of the third class


def test_the_loss_of_a_blind_head_is_the_entropy_of_the_classes():
    assert blind_loss(SHARES) == pytest.approx(1.0297, abs=1e-4)
    assert blind_loss(np.full(10, 0.1)) == pytest.approx(np.log(10))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 3.0]])
def test_the_loss_of_a_blind_head_is_the_least_that_the_training_loss_can_become(
    smoothing, weights
):
    labels = torch.tensor([0] * 5 + [1] * 3 + [3] * 2)
    class_weights = None if weights is None else torch.tensor(weights)
    loss = TrainingLoss(LossOptions(label_smoothing=smoothing), class_weights)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value = loss(torch.empty(0), logits.expand(10, 4), labels)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(step)
    expected = blind_loss(SHARES, None if weights is None else np.array(weights), smoothing)
    assert float(step().detach()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "accuracy", "nothing"),
    [
        (1.05, 0.50, True),
        (1.05, 0.503, True),  # by chance
        (1.05, 0.80, False),
        (0.90, 0.50, False),
    ],
)
def test_loss_and_accuracy_must_both_say_that_a_head_has_learned_nothing(loss, accuracy, nothing):
    assert has_learned_nothing(loss, accuracy, blind_loss(SHARES), SHARES, 10_000) == nothing


@pytest.mark.parametrize(("largest", "nothing"), [(0.4, True), (0.9, False)])
def test_beside_a_teacher_the_accuracy_alone_says_it_if_no_class_has_most_images(largest, nothing):
    shares = np.array([largest, 1 - largest])
    shares = np.append(shares[:1], np.full(4, shares[1] / 4))
    assert has_learned_nothing(9.0, largest, None, shares, 10_000) == nothing


STILL = Augment(
    padding=0, flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, degrees=0.0
)


class Unequal(ImageDataModule):
    """Images of which nine in ten are of the first class, and whose brightness hints at it."""

    class_names = ("dark", "bright")

    def load(self, split):
        if split == "val":
            return None
        labels = (np.arange(400) % 10 == 9).astype(int)
        chance = np.random.default_rng(0)
        brightness = (100 + 35 * labels + chance.normal(0, 20, 400)).clip(0, 255)
        pixels = np.broadcast_to(brightness[:, None, None, None], (400, 3, 32, 32))
        return ArrayImages(pixels.astype(np.uint8), labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model"),
    [
        ({"class_weights": "balanced"}, {}),
        pytest.param({"sampler": "balanced"}, {}, marks=pytest.mark.whole),
        pytest.param({}, {"label_smoothing": 0.3}, marks=pytest.mark.whole),
    ],
    ids=["weights", "sampler", "smoothing"],
)
@pytest.mark.parametrize("dead", [True, False])
def test_unequal_classes_do_not_hide_or_fake_what_a_head_learns(data, model, dead):
    seed_everything(0)
    network = TransferClassifier("lenet5", "none", num_classes=2, lr=0.01, **model)
    if dead:
        for parameter in network.network.features.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    freeze = BackboneFreeze(unfreeze_epoch=1, frozen=[r"network\.features\."])
    trainer = quiet_trainer(max_epochs=2, callbacks=[freeze, LossGuard()])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(network, Unequal(batch_size=2, augment=STILL, **data))
    assert any("has learned nothing from" in str(warning.message) for warning in seen) == dead
