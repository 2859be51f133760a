"""`BackboneFreeze` in one process: what trains when, in which mode, at which rate, and resumed."""

import copy
import re
import warnings
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import others
import pytest
import torch
from conftest import assert_same_weights, quiet_trainer
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from cifar_transfer import Augment, BackboneFreeze, Phase, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.training import freeze as freeze_file
from cifar_transfer.training.phases import stages_of


def make(**model):
    seed_everything(0)
    data = ShapesDataModule(train_images=160, test_images=40, batch_size=32, augment=Augment())
    options = {"backbone": "shufflenet_v2_x0_5", "weights": "none"} | model
    return TransferClassifier(**options, class_names=data.class_names), data


def trainable(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


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
                    "trains": trainable(module.network),
                    "eval": {
                        name for name, child in module.network.named_modules() if not child.training
                    },
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


@pytest.mark.parametrize("unfreeze_epoch", [0, 1])
def test_batch_norm_may_keep_its_statistics_to_the_end(tmp_path, unfreeze_epoch):
    freeze = BackboneFreeze(unfreeze_epoch=unfreeze_epoch, batch_norm="fixed")
    rows, _ = fit(tmp_path, freeze, 3)
    for row in rows[1:]:
        assert torch.equal(row["statistics"], rows[0]["statistics"])
        assert not row["training"]
    assert not torch.equal(rows[-1]["backbone"], rows[0]["backbone"])
    assert "conv1" in rows[0]["eval"] or unfreeze_epoch == 0
    assert "conv1" not in rows[-1]["eval"]


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
    before = dict(fresh.network.named_parameters())
    after = dict(module.network.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def warned(freeze, model, epochs=1, **options):
    """Return the warnings of a fit that ends before its first step."""
    data = ShapesDataModule(train_images=40, test_images=20)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[freeze], max_steps=0, **options)
        trainer.fit(model, data)
    return " ".join(str(warning.message) for warning in seen)


def test_a_frozen_backbone_without_weights_is_warned_of_before_training(tmp_path):
    words = "The backbone has learned nothing (weights=none), and it is frozen at first"
    model, _ = make()
    assert words in warned(BackboneFreeze(1), model)
    assert words in warned(BackboneFreeze(1, frozen=r"network\.conv1"), model)
    assert words not in warned(BackboneFreeze(0), model)
    torch.save(model.network.state_dict(), tmp_path / "w.pth")
    trained, _ = make(weights=str(tmp_path / "w.pth"))
    assert words not in warned(BackboneFreeze(1), trained)
    model.load_state_dict(model.state_dict())
    assert words not in warned(BackboneFreeze(1), model)


@pytest.mark.parametrize(
    ("freeze", "epochs", "words"),
    [
        (
            BackboneFreeze(),
            3,
            "The run ends with epoch 3, and all would begin to train with epoch 6",
        ),
        (BackboneFreeze(5), 5, "ends with epoch 5, and all would begin to train with epoch 6"),
        (BackboneFreeze(5), 6, None),
        (BackboneFreeze(0), 3, None),
        (BackboneFreeze(5), -1, None),
        (BackboneFreeze(phases="gradual"), 3, "stage3 would begin to train with epoch 4"),
    ],
)
def test_phases_that_the_run_does_not_reach_are_told_once(freeze, epochs, words):
    model, _ = make()
    text = warned(freeze, model, epochs)
    assert text.count("The run ends with epoch") == (words is not None)
    assert (words or "") in text


def test_patterns_freeze_only_what_they_name(tmp_path):
    freeze = BackboneFreeze(unfreeze_epoch=99, frozen=[r"network\.(conv1|stage2)\."])
    rows, module = fit(tmp_path, freeze, 1)
    names = {name for name, _ in module.network.named_parameters()}
    frozen = {name for name in names if name.startswith(("conv1.", "stage2."))}
    assert rows[0]["trains"] == names - frozen
    assert {"conv1", "stage2", "stage2.0.branch1.1"} <= rows[0]["eval"]
    assert not {"", "stage3", "stage3.0.branch1.1"} & rows[0]["eval"]
    assert trainable(module.network) == names, "given back as it was"


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="nonsense"):
        fit(tmp_path, BackboneFreeze(frozen=["nonsense"]), 1)


def test_a_pattern_that_matches_everything_is_refused(tmp_path):
    with pytest.raises(UserError, match="freezes every parameter, also the head's"):
        fit(tmp_path, BackboneFreeze(frozen=[r"network\..*"]), 1)


def test_a_module_without_a_named_head_is_not_frozen_as_a_whole():
    with pytest.raises(UserError, match="Net names no head"):
        others.fit(others.Net(), BackboneFreeze())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze_epoch": -1}, "unfreeze_epoch is -1: take 0"),
        ({"unfrozen_lr": 0.0}, "unfrozen_lr is 0.0: take a positive rate"),
        ({"batch_norm": "train_bn"}, "batch_norm is train_bn: take"),
        ({"mode": "lowest"}, "mode is lowest: take"),
        ({"phases": "sudden"}, 'phases is sudden: take "gradual"'),
        ({"phases": []}, "give one or more"),
        ({"frozen": []}, r"frozen is \[\]"),
        ({"frozen": ["fc("]}, "not a regular expression"),
        ({"phases": "gradual", "frozen": ["conv1"]}, "and no frozen"),
        ({"probe": True, "phases": "gradual"}, "leave out phases and frozen"),
        ({"unfrozen_lr": torch.nn.Linear(1, 1)}, "a checkpoint cannot store"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BackboneFreeze(**options)


def test_options_of_numpy_and_torch_are_stored_as_primitives():
    freeze = BackboneFreeze(
        unfreeze_epoch=np.int64(5),
        unfrozen_lr=torch.tensor(0.5),
        frozen=(np.str_("fc"),),
        probe=np.bool_(False),
        monitor=np.str_("val/acc"),
    )
    assert_primitives(freeze.state_dict())
    assert freeze.state_dict()["options"]["unfreeze_epoch"] == 5
    assert freeze.state_dict()["options"]["unfrozen_lr"] == 0.5
    phase = Phase((np.str_("all"),), epoch=np.int64(2), lr=np.float64(0.5), from_best=np.True_)
    assert phase == Phase(["all"], epoch=2, lr=0.5, from_best=True)
    assert_primitives(BackboneFreeze(phases=(Phase(["head"]), phase)).state_dict())


def assert_primitives(value):
    if type(value) is dict:
        for key, item in value.items():
            assert type(key) is str
            assert_primitives(item)
    elif type(value) is list:
        for item in value:
            assert_primitives(item)
    else:
        assert value is None or type(value) in (bool, int, float, str)


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

    # Listed before the freeze, it damages the history just before the unfreezing forgets it.
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
    checkpoint = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["BackboneFreeze"]["phase"] == 1
    rows, module = fit(
        tmp_path, BackboneFreeze(unfreeze_epoch=1), 3, ckpt_path=tmp_path / "step=8.ckpt"
    )
    assert rows[-1]["trains"] == {name for name, _ in module.network.named_parameters()}
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


@pytest.mark.parametrize(
    ("option", "value", "change"),
    [
        ("unfreeze_epoch", 3, "unfreeze_epoch=3 differs from 1"),
        ("unfrozen_lr", 1e-5, "unfrozen_lr=1e-05 differs from 0.0001"),
        ("unfrozen_lr", None, "unfrozen_lr=null differs from 0.0001"),
        ("frozen", ["head"], "frozen=['head'] differs from null"),
        ("batch_norm", "train", "batch_norm=train differs from eval"),
        ("phases", "gradual", "phases=gradual differs from null"),
        ("probe", True, "probe=true differs from false"),
        ("monitor", "val/acc", "monitor=val/acc differs from val/loss"),
        ("mode", "max", "mode=max differs from min"),
    ],
)
def test_a_run_continues_with_its_own_options(option, value, change):
    state = BackboneFreeze(unfreeze_epoch=1).state_dict()
    BackboneFreeze(unfreeze_epoch=1).load_state_dict(state)
    changed = BackboneFreeze(**{"unfreeze_epoch": 1, option: value})
    sentence = f"freeze.{change}, with which the run began: leave it out to continue the run"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        changed.load_state_dict(state)


def test_phases_that_differ_are_refused():
    plan = [Phase(["head"]), Phase(["all"], epoch=2)]
    state = BackboneFreeze(phases=plan).state_dict()
    BackboneFreeze(phases=copy.deepcopy(plan)).load_state_dict(state)
    later = BackboneFreeze(phases=[plan[0], Phase(["all"], epoch=3)])
    with pytest.raises(UserError, match=r"freeze\.phases=.*'epoch': 3.* differs from .*'epoch': 2"):
        later.load_state_dict(state)


def test_a_resumed_fit_refuses_a_changed_option(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", **EACH_EPOCH)
    fit(tmp_path, BackboneFreeze(unfreeze_epoch=1), 1, keep)
    changed = BackboneFreeze(unfreeze_epoch=2)
    with pytest.raises(UserError, match=r"freeze\.unfreeze_epoch=2 differs from 1"):
        fit(tmp_path, changed, 3, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_the_plans_in_the_documentation_of_the_file_are_those_that_are_made():
    module = TransferClassifier("resnet18", "none")
    examples = re.findall(
        r"^    (BackboneFreeze\(.*?\))(?: +#.*)?\n((?: {8,}.*\n)+)",
        freeze_file.__doc__,
        re.MULTILINE,
    )
    calls = re.findall(r"^    BackboneFreeze\(", freeze_file.__doc__, re.MULTILINE)
    assert len(examples) == len(calls) > 0, "each has its plan below it"
    names = {"BackboneFreeze": BackboneFreeze, "Phase": Phase}
    for call, plan in examples:
        freeze = eval(call, names)
        assert freeze._make_plan(module, stages_of(module)) == eval(plan.strip(), names), call


def test_everything_trains_when_the_last_phase_has_begun(tmp_path):
    freeze = BackboneFreeze(unfreeze_epoch=1)
    assert not freeze.everything_trains, "before the fit"
    states = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                states.append(freeze.everything_trains)

    fit(tmp_path, freeze, 3, Look())
    assert states == [False, True, True]


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
