"""Learning rates from step to step, of backbone and head, through unfreezing and resuming."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, quiet_trainer
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint

from cifar_transfer import BackboneFreeze, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.training.optimizer import OptimizerOptions

STEPS = 4  # an epoch: 120 images in batches of 30


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def fit(folder, *callbacks, epochs=3, freeze=None, ckpt_path=None, max_steps=-1, **options):
    seed_everything(0)
    data = ShapesDataModule(train_images=160, test_images=40, val_fraction=0.25, batch_size=30)
    options = {"schedule": "linear", "lr": 1e-2} | options
    module = TransferClassifier(
        "shufflenet_v2_x0_5", "none", class_names=data.class_names, **options
    )
    rates = Rates()
    trainer = quiet_trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        callbacks=[freeze or BackboneFreeze(unfreeze_epoch=0), rates, *callbacks],
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return rates.rates, trainer


def test_up_in_a_line_and_down_to_zero(tmp_path):
    rates, _ = fit(tmp_path, warmup_epochs=1.0)
    expected = [
        1e-2 * share for share in (0.2, 0.4, 0.6, 0.8, *(1 - step / 8 for step in range(8)))
    ]
    assert [rate for (rate,) in rates] == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [3, -1])
def test_a_warmup_epoch_is_an_epoch_when_max_steps_ends_the_run(tmp_path, epochs):
    rates, _ = fit(tmp_path, epochs=epochs, max_steps=6, warmup_epochs=1.0)
    assert [rate for (rate,) in rates] == pytest.approx(
        [1e-2 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 0.5)]
    )


def test_cosine_without_warmup(tmp_path):
    rates, _ = fit(tmp_path, schedule="cosine", epochs=1)
    assert [rate for (rate,) in rates] == pytest.approx(
        [1e-2, 1e-2 * 0.8535534, 5e-3, 1e-2 * 0.1464466]
    )


def test_the_unfreezing_scales_the_curve_of_the_backbone_alone(tmp_path):
    freeze = BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-3)
    rates, _ = fit(tmp_path, freeze=freeze, head_lr=5e-2)
    share = [1 - step / 12 for step in range(12)]
    assert [head for _, head in rates] == pytest.approx([5e-2 * s for s in share])
    assert [backbone for backbone, _ in rates] == pytest.approx(
        [(1e-2 if step < STEPS else 1e-3) * s for step, s in enumerate(share)]
    )


def test_sgd_takes_up_unfrozen_parameters_beside_those_that_have_a_momentum(tmp_path):
    rates, _ = fit(
        tmp_path,
        freeze=BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-3),
        epochs=2,
        optimizer="sgd",
    )
    assert len(rates) == 2 * STEPS


def test_a_plateau_waits_for_the_validation_loss(tmp_path):
    """It rises in the third and the fourth epoch; the accuracy, for which a fall counts, never."""
    losses = [2.0, 1.0, 1.5, 1.2, 0.5, 0.6]
    data = ShapesDataModule(train_images=40, test_images=10, batch_size=20, val_fraction=0.25)
    model = TransferClassifier("lenet5", "none", lr=0.01, lr_factor=0.5, lr_patience=1)
    model.val_loss.compute = lambda: torch.tensor(losses[model.current_epoch])
    model.val_acc.compute = lambda: torch.tensor(0.1 * (model.current_epoch + 1))
    rates = []
    watch = LambdaCallback(on_train_epoch_start=lambda *_: rates.append(model.learning_rate))
    quiet_trainer(max_epochs=6, callbacks=[watch], default_root_dir=tmp_path).fit(model, data)
    assert rates == [0.01, 0.01, 0.01, 0.01, 0.005, 0.005]


def test_with_a_plateau_the_head_keeps_its_own_rate(tmp_path):
    freeze = BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-3)
    rates, trainer = fit(tmp_path, freeze=freeze, epochs=2, head_lr=5e-2, schedule="plateau")
    assert rates[0] == [1e-2, 5e-2]
    assert rates[-1] == [1e-3, 5e-2]
    head = trainer.optimizers[0].param_groups[1]["params"]
    assert [id(p) for p in head] == [id(p) for p in trainer.model.network.fc.parameters()]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_goes_on_along_the_curve(tmp_path, optimizer):
    options = {"optimizer": optimizer, "warmup_epochs": 0.5, "freeze": None, "head_lr": 2e-2}

    def job(folder, ckpt_path=None):
        freeze = BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-3)
        saved = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        return fit(folder, saved, ckpt_path=ckpt_path, **options | {"freeze": freeze})[0]

    whole = job(tmp_path / "whole")
    rest = job(tmp_path / "rest", tmp_path / "whole" / "epoch=1.ckpt")
    assert rest == whole[2 * STEPS :]
    assert_same_weights(tmp_path / "whole" / "epoch=2.ckpt", tmp_path / "rest" / "epoch=2.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 4.0}, "warmup_epochs=4.0 is 16 steps, but the run has 12"),
        ({"warmup_epochs": 1.0, "max_steps": 3}, "warmup_epochs=1.0 is 4 steps, but the run has 3"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"epochs": -1}, "set max_epochs or max_steps"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, **options)


def test_label_smoothing_is_of_training_alone(tmp_path):
    data = ShapesDataModule(train_images=160, test_images=40)
    module = TransferClassifier(
        "shufflenet_v2_x0_5", "none", class_names=data.class_names, label_smoothing=0.3
    ).eval()
    logs = {}
    module.log = lambda name, value, **_: logs.setdefault(name, value)
    module._trainer = None
    batch = torch.rand(8, 3, 32, 32), torch.arange(8)
    with torch.no_grad():
        logits = module(batch[0])
        trained = module.training_step(batch, 0)
        module.validation_step(batch, 0)
    torch.testing.assert_close(
        trained, torch.nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.3)
    )
    torch.testing.assert_close(
        logs["val/loss"].compute(), torch.nn.functional.cross_entropy(logits, batch[1])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamax"}, 'optimizer is adamax: take "adam", "adamw" or "sgd"'),
        ({"schedule": "step"}, 'schedule is step: take "plateau", "linear" or "cosine"'),
        ({"lr": 1001}, "lr is 1001: take a positive rate up to 1000"),
        ({"lr": True}, "lr is True: take a positive rate"),
        ({"lr": None}, "lr is null: take a positive rate"),
        ({"head_lr": 0.0}, "head_lr is 0.0: take a positive rate"),
        ({"layer_decay": 1.5}, r"layer_decay is 1.5: take a share in \(0, 1\], or null"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: take 0 to 1000"),
        ({"momentum": 1.0}, r"momentum is 1.0: take a share in \[0, 1\)"),
        ({"warmup_epochs": float("inf")}, "warmup_epochs is inf: take 0 epochs or more"),
        ({"warmup_epochs": 1.0}, "warmup_epochs is 1.0: take 0 for a plateau"),
        ({"lr_factor": 1.0}, "lr_factor is 1.0: take a factor between 0 and 1"),
        ({"lr_patience": -1}, "lr_patience is -1: take 0 epochs or more"),
        ({"lr": np.logspace(-3, -1, 3)}, "lr is .*: take a positive rate"),
        ({"lr": torch.nn.Linear(1, 1)}, "a checkpoint cannot store"),
    ],
)
def test_options_of_the_optimizer_check_themselves(options, message):
    with pytest.raises(UserError, match=message):
        OptimizerOptions(**options)


def test_options_of_numpy_become_primitives():
    options = OptimizerOptions(np.str_("sgd"), np.logspace(-3, -1, 3)[1], lr_patience=np.int64(3))
    assert options == OptimizerOptions("sgd", 1e-2, lr_patience=3)
    assert {type(value) for value in asdict(options).values()} <= {str, float, int, type(None)}


@pytest.mark.parametrize("head_lr", [None, 0.1])
def test_parameters_are_optimized_in_the_order_that_checkpoints_rely_on(head_lr):
    module = TransferClassifier("lenet5", "none", head_lr=head_lr)
    module._trainer = SimpleNamespace(gradient_clip_val=None)
    groups = module.configure_optimizers()["optimizer"].param_groups
    heads = {
        id(p) for head in module.heads for p in module.network.get_submodule(head).parameters()
    }
    apart = [[p for p in module.parameters() if (id(p) in heads) == part] for part in (False, True)]
    expected = [list(module.parameters())] if head_lr is None else apart
    assert [list(map(id, group["params"])) for group in groups] == [
        list(map(id, part)) for part in expected
    ]
