"""The freeze schedule in one process: what trains when, in which mode, at which rate, and after resuming."""

from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_same_weights, quiet_trainer
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from cifar_transfer import Augment, BackboneFreeze, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError


def make(**model):
    seed_everything(0)
    data = ShapesDataModule(train_images=160, test_images=40, batch_size=32, augment=Augment())
    options = {"backbone": "shufflenet_v2_x0_5", "weights": "none"} | model
    return TransferClassifier(**options, class_names=data.class_names), data


class Watch(Callback):
    """Records, epoch by epoch, what was trained and how."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            conv, batch_norm = module.network.conv1[:2]
            self.rows.append(
                {
                    "epoch": trainer.current_epoch,
                    "backbone": conv.weight.detach().clone(),
                    "statistics": batch_norm.running_mean.clone(),
                    "head": module.network.fc.weight.detach().clone(),
                    "lr": trainer.optimizers[0].param_groups[0]["lr"],
                    "bad": trainer.lr_scheduler_configs[0].scheduler.num_bad_epochs,
                    "training": batch_norm.training,
                    "trains": {name for name, p in module.named_parameters() if p.requires_grad},
                    "eval": {name for name, child in module.named_modules() if not child.training},
                }
            )


def fit(tmp_path, freeze, epochs, *callbacks, ckpt_path=None, model=None, **trainer):
    watch = Watch()
    module, data = make(**(model or {}))
    quiet_trainer(
        max_epochs=epochs,
        callbacks=[*([freeze] if freeze else []), watch, *callbacks],
        default_root_dir=tmp_path,
        **trainer,
    ).fit(module, data, ckpt_path=ckpt_path)
    return watch.rows, module


def changed(rows, key):
    """Whether a tensor changed between the second steps of consecutive epochs."""
    return [not torch.equal(a[key], b[key]) for a, b in pairwise(rows)]


def test_backbone_and_its_statistics_stand_still_until_the_epoch_comes(tmp_path):
    rows, _ = fit(tmp_path, BackboneFreeze(unfreeze_epoch=2, unfrozen_lr=1e-4), 4)
    assert changed(rows, "backbone") == [False, True, True]
    assert changed(rows, "statistics") == [False, True, True]
    assert changed(rows, "head") == [True, True, True]
    assert [row["lr"] for row in rows] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert [row["training"] for row in rows] == [False, False, True, True]


def test_batch_norm_may_follow_the_data_while_frozen(tmp_path):
    rows, _ = fit(tmp_path, BackboneFreeze(unfreeze_epoch=2, batch_norm="train"), 2)
    assert changed(rows, "backbone") == [False]
    assert changed(rows, "statistics") == [True]


def test_zero_never_freezes_and_keeps_the_rate(tmp_path):
    rows, _ = fit(tmp_path, BackboneFreeze(unfreeze_epoch=0, unfrozen_lr=1e-4), 2)
    without, _ = fit(tmp_path, None, 2)
    assert changed(rows, "backbone") == [True]
    assert [row["lr"] for row in rows] == [1e-3, 1e-3]
    assert torch.equal(rows[-1]["backbone"], without[-1]["backbone"])


def test_beyond_the_last_epoch_only_the_head_trains(tmp_path):
    _, module = fit(tmp_path, BackboneFreeze(unfreeze_epoch=99), 2)
    fresh, _ = make()
    same = [torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True)]
    assert same == [
        not name.startswith("classifier.network.fc.") for name, _ in module.named_parameters()
    ]


def test_patterns_freeze_only_what_they_name(tmp_path):
    freeze = BackboneFreeze(unfreeze_epoch=99, frozen=[r"classifier\.network\.(conv1|stage2)\."])
    rows, module = fit(tmp_path, freeze, 1)
    names = {name for name, _ in module.named_parameters()}
    assert names - rows[0]["trains"] == {
        n
        for n in names
        if n.startswith(("classifier.network.conv1.", "classifier.network.stage2."))
    }
    assert {
        "classifier.network.conv1",
        "classifier.network.stage2",
        "classifier.network.stage2.0.branch1.1",
    } <= rows[0]["eval"]
    assert (
        not {"network", "classifier.network.stage3", "classifier.network.stage3.0.branch1.1"}
        & rows[0]["eval"]
    )
    assert all(parameter.requires_grad for parameter in module.parameters()), "given back as it was"


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="nonsense"):
        fit(tmp_path, BackboneFreeze(frozen=["nonsense"]), 1)


def test_a_pattern_that_matches_everything_is_refused(tmp_path):
    with pytest.raises(UserError, match="freezes every parameter, also the head's"):
        fit(tmp_path, BackboneFreeze(frozen=[r"classifier\.network\..*"]), 1)


def test_a_module_without_a_named_head_is_not_frozen_as_a_whole(tmp_path):
    module, _ = make()
    del module.heads
    with pytest.raises(UserError, match="names no head"):
        BackboneFreeze().on_fit_start(quiet_trainer(default_root_dir=tmp_path), module)


@pytest.mark.parametrize("bad", [{"unfreeze_epoch": -1}, {"unfrozen_lr": 0.0}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        BackboneFreeze(**bad)


def test_strategies_that_shard_are_refused(tmp_path):
    module, _ = make()
    trainer = SimpleNamespace(strategy=Mock(spec=FSDPStrategy), callbacks=[])
    with pytest.raises(UserError, match=r"shards.*strategy=ddp"):
        BackboneFreeze().setup(trainer, module, "fit")


def test_the_plateau_starts_afresh_at_the_unfreezing(tmp_path):
    class Worsen(Callback):
        """Make every frozen epoch look worse than the first."""

        def on_train_epoch_start(self, trainer, module):
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            if trainer.current_epoch == 1:
                scheduler.best, scheduler.num_bad_epochs = -1.0, 2

    # Listed before the freeze, it damages the history just before the transition, which must forget it.
    module, data = make()
    watch = Watch()
    quiet_trainer(
        max_epochs=3,
        callbacks=[Worsen(), BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-4), watch],
        default_root_dir=tmp_path,
    ).fit(module, data)
    assert [row["lr"] for row in watch.rows] == [1e-3, 1e-4, 1e-4]
    assert watch.rows[1]["bad"] == 0


EACH_EPOCH = {"save_top_k": -1, "save_on_train_epoch_end": True}


def test_resumed_before_at_and_after_the_unfreezing_ends_alike(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", **EACH_EPOCH)
    rows, _ = fit(tmp_path, BackboneFreeze(unfreeze_epoch=2), 4, keep)
    for epoch in (0, 1, 2):  # written before, at and after the transition
        again = ModelCheckpoint(tmp_path / f"from{epoch}", "{epoch}", **EACH_EPOCH)
        resumed, _ = fit(
            tmp_path,
            BackboneFreeze(unfreeze_epoch=2),
            4,
            again,
            ckpt_path=tmp_path / f"epoch={epoch}.ckpt",
        )
        assert [row["lr"] for row in resumed] == [row["lr"] for row in rows[epoch + 1 :]]
        assert [row["training"] for row in resumed] == [
            row["training"] for row in rows[epoch + 1 :]
        ]
        assert_same_weights(tmp_path / "epoch=3.ckpt", tmp_path / f"from{epoch}" / "epoch=3.ckpt")


def test_resumed_in_the_middle_of_the_epoch_of_unfreezing_stays_unfrozen(tmp_path):
    # Five steps an epoch: step 8 is in the middle of epoch 1, in which it unfreezes.
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path, BackboneFreeze(unfreeze_epoch=1), 2, keep)
    assert torch.load(tmp_path / "step=8.ckpt", weights_only=True)["callbacks"]["BackboneFreeze"][
        "unfrozen"
    ]
    rows, module = fit(
        tmp_path, BackboneFreeze(unfreeze_epoch=1), 3, ckpt_path=tmp_path / "step=8.ckpt"
    )
    assert rows[-1]["trains"] == {name for name, _ in module.named_parameters()}
    assert rows[-1]["training"]
    assert rows[-1]["lr"] == 1e-4


def test_a_rate_lowered_after_the_unfreezing_survives_resuming(tmp_path):
    class Lower(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups[0]["lr"] = 3e-5
                trainer.lr_scheduler_configs[
                    0
                ].scheduler.best = -1.0  # so that the epoch counts as a bad one

    fit(
        tmp_path,
        BackboneFreeze(unfreeze_epoch=1),
        2,
        Lower(),
        ModelCheckpoint(tmp_path, "{epoch}", **EACH_EPOCH),
    )
    rows, _ = fit(
        tmp_path, BackboneFreeze(unfreeze_epoch=1), 3, ckpt_path=tmp_path / "epoch=1.ckpt"
    )
    assert [(row["lr"], row["bad"]) for row in rows] == [(3e-5, 1)]


def test_settings_that_a_resumed_checkpoint_would_undo_are_refused(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", **EACH_EPOCH)
    fit(tmp_path, BackboneFreeze(unfreeze_epoch=1), 2, keep)
    unfrozen, frozen = tmp_path / "epoch=1.ckpt", tmp_path / "epoch=0.ckpt"
    with pytest.raises(UserError, match=r"unfrozen_lr.*no effect"):
        fit(tmp_path, BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-5), 3, ckpt_path=unfrozen)
    with pytest.raises(UserError, match=r"model\.lr=0\.5 would be undone"):
        fit(tmp_path, BackboneFreeze(unfreeze_epoch=1), 3, ckpt_path=unfrozen, model={"lr": 0.5})
    rows, _ = fit(tmp_path, BackboneFreeze(unfreeze_epoch=2, unfrozen_lr=1e-5), 3, ckpt_path=frozen)
    assert [row["lr"] for row in rows] == [1e-3, 1e-5], (
        "a checkpoint that is still frozen takes another plan"
    )


@pytest.mark.parametrize(
    "setting",
    [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 3}],
    ids=lambda setting: next(iter(setting)),
)
def test_trainer_settings_work_with_the_freeze(tmp_path, setting):
    rows, _ = fit(tmp_path, BackboneFreeze(unfreeze_epoch=1, unfrozen_lr=1e-4), 3, **setting)
    assert changed(rows, "statistics") == [True, True]
    assert [row["lr"] for row in rows] == [1e-3, 1e-4, 1e-4]
    assert all(row["backbone"].isfinite().all() for row in rows)
