"""Losses that are NaN or infinite, and a frozen backbone that teaches nothing."""

import warnings

import pytest
import torch
from conftest import quiet_trainer, weights
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from cifar_transfer import ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.fit import fit
from cifar_transfer.training.loss_guard import SCALED, Guard

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
def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_the_checkpoints_whole(
    tmp_path, monkeypatch, value
):
    """In the second of six steps an epoch: neither a line of the log nor the end of an epoch is near."""
    monkeypatch.chdir(tmp_path)
    real = TransferClassifier.training_step
    monkeypatch.setattr(
        TransferClassifier,
        "training_step",
        lambda self, *batch: real(self, *batch) * (value if self.global_step == 13 else 1),
    )
    with pytest.raises(
        UserError,
        match=r"training loss of step 13 is NaN or infinite \(epoch 3, learning rate 0.002\)",
    ):
        fit([*LENET, "--trainer.max_epochs=5", "--model.lr=2e-3"])
    for name in ("best", "last"):
        assert torch.load(f"{CHECKPOINTS}/{name}.ckpt", weights_only=True)["epoch"] <= 1
        assert all(
            tensor.isfinite().all() for tensor in weights(f"{CHECKPOINTS}/{name}.ckpt").values()
        )
    monkeypatch.setattr(TransferClassifier, "training_step", real)
    assert fit(["--resume=lightning_logs/version_0"]).scores["best/test_acc"] > 0, (
        "and the run continues"
    )


def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = TransferClassifier._evaluate

    def evaluate(self, batch, *rest, **options):
        return real(
            self,
            (batch[0] * (torch.nan if self.current_epoch == 1 else 1), batch[1]),
            *rest,
            **options,
        )

    monkeypatch.setattr(TransferClassifier, "_evaluate", evaluate)
    with pytest.raises(UserError, match="validation loss of epoch 2 is NaN or infinite"):
        fit([*LENET, "--trainer.max_epochs=3"])
    assert torch.load(f"{CHECKPOINTS}/last.ckpt", weights_only=True)["epoch"] == 0


class Overflow(Callback):
    """Losses that are none for some steps, as an overflow in half precision makes them."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step <= self.steps:
            outputs["loss"] = outputs["loss"] * torch.nan


@pytest.mark.parametrize("scaled", [True, False])
def test_what_the_scaler_of_half_precision_sees_to_is_left_to_it(tmp_path, monkeypatch, scaled):
    """Its scale is far too high at first, so that gradients overflow, and so do some losses."""
    monkeypatch.chdir(tmp_path)
    data = ShapesDataModule(train_images=400, test_images=50, batch_size=10)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)

    def trainer(overflows):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
        return quiet_trainer(
            max_epochs=1,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scaled else [],
            callbacks=[Overflow(overflows), Guard()],
        )

    if scaled:
        trainer(SCALED - 1).fit(model, data)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        with pytest.raises(UserError, match="training loss of step 0 is NaN or infinite"):
            trainer(SCALED).fit(model, data)
    else:
        with pytest.raises(UserError, match="training loss of step 0 is NaN or infinite"):
            trainer(1).fit(model, data)


@pytest.mark.parametrize("dead", [True, False])
def test_a_frozen_backbone_that_teaches_nothing_is_told(tmp_path, monkeypatch, dead):
    monkeypatch.chdir(tmp_path)
    fit([*LENET, "--trainer.max_epochs=10", "--model.lr=3e-3"])
    state = weights(f"{CHECKPOINTS}/last.ckpt")
    torch.save(
        {
            name.removeprefix("classifier.network."): value * (not dead)
            for name, value in state.items()
        },
        "w.pth",
    )
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
    assert any("taught the head nothing" in str(warning.message) for warning in seen) == dead
