"""`BackboneFreeze` with any LightningModule and optimizer, not only the project's.

Among these are the nine cases of Lightning's tests of its own finetuning callbacks.
"""

import copy
import logging
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import quiet_trainer
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from others import STEPS, Net, fit, freeze, trainable
from torch import nn
from torch.optim import SGD, Adam
from torchvision import models

from cifar_transfer import BackboneFreeze, Phase, ShapesDataModule
from cifar_transfer.base.errors import UserError


def test_an_optimizer_of_trainable_parameters_takes_up_what_is_unfrozen_later():
    watch = fit(Net(optimizer=trainable), freeze())
    assert watch.moved("backbone.0.weight") == [False, True, True]
    assert [rates[0] for rates in watch.rates] == [0.01] * STEPS + [1e-4] * (2 * STEPS + 1)


def test_parameters_that_no_optimizer_has_are_reported_at_the_start(caplog):
    caplog.set_level(logging.INFO)
    watch = fit(Net(optimizer=lambda module: SGD(module.head.parameters(), 0.01)), freeze())
    message = (
        "6 tensors of parameters, such as backbone.0.weight, never train, "
        "because no optimizer has them."
    )
    assert caplog.messages.count(message) == 1
    assert watch.moved("backbone.0.weight") == [False] * 3


@pytest.mark.parametrize("epoch", [0, 1])
def test_parameters_that_the_module_fixed_stay_fixed(epoch, caplog):
    caplog.set_level(logging.INFO)
    module = Net()
    module.backbone[0].weight.requires_grad_(False)
    watch = fit(module, freeze(epoch))
    assert watch.moved("backbone.0.weight") == [False] * 3
    assert watch.moved("backbone.3.weight") == [epoch == 0, True, True]
    assert not module.backbone[0].weight.requires_grad
    assert ("the module itself has fixed them" in caplog.text) == (epoch > 0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_sgd_takes_up_what_is_unfrozen(nesterov):
    def make(fused):
        return lambda module: SGD(
            module.parameters(), 0.01, momentum=0.9, nesterov=nesterov, fused=fused
        )

    seed_everything(0)
    module = Net(optimizer=make(fused=True))
    copied_module = copy.deepcopy(module)
    copied_module.make = make(fused=False)
    fused = fit(module, freeze())
    plain = fit(copied_module, freeze())
    assert fused.moved("backbone.0.weight") == [False, True, True]
    torch.testing.assert_close(fused.weights[-1], plain.weights[-1])


def test_fused_sgd_with_dampening_is_refused_before_the_first_step():
    def make(module):
        return SGD(module.parameters(), 0.01, momentum=0.9, dampening=0.1, fused=True)

    with pytest.raises(UserError, match="Fused SGD with dampening"):
        fit(Net(optimizer=make), freeze())


def test_frozen_modules_without_parameters_are_in_eval_mode_too():
    backbone = nn.Sequential(
        nn.Linear(8, 16),
        nn.BatchNorm1d(16, affine=False),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(16, 16),
        nn.Dropout(0.5),
    )
    head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 3))
    watch = fit(Net(backbone, head), freeze())
    assert watch.moved("backbone.1.running_mean") == [False, True, True]
    assert watch.moved("head.1.running_mean") == [True] * 3
    assert watch.eval[0] == {"backbone", *(f"backbone.{n}" for n in range(6))}
    assert watch.eval[STEPS] == set()


def test_a_dropout_is_in_eval_mode_within_frozen_modules_and_before_one_in_a_sequence():
    sequence = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5))
    head = nn.Sequential(sequence, nn.Dropout(0.5), nn.Linear(16, 3))
    watch = fit(Net(nn.Identity(), head), freeze(frozen=[r"head\.0\.2", r"head\.0\.0"]))
    assert watch.eval[0] == {"head.0", *(f"head.0.{n}" for n in range(4))}
    watch = fit(Net(nn.Identity(), head), freeze(frozen=[r"head\.0\.2"]))
    assert watch.eval[0] == {"head.0.1", "head.0.2"}
    assert watch.eval[STEPS] == set()


@pytest.mark.parametrize("registered_first", [False, True])
def test_a_dropout_behind_the_backbone_stays_on_wherever_it_is_registered(registered_first):
    class Dropping(Net):
        def __init__(self):
            super().__init__()
            if registered_first:
                backbone = self.backbone
                del self.backbone
                self.dropout = nn.Dropout(0.5)
                self.backbone = backbone
            else:
                self.dropout = nn.Dropout(0.5)

        def training_step(self, batch, batch_idx):
            hidden = self.dropout(self.backbone(batch[0]))
            return F.cross_entropy(self.head(hidden), batch[1])

    watch = fit(Dropping(), freeze())
    assert watch.eval[0] == {"backbone", *(f"backbone.{n}" for n in range(4))}


def test_modules_without_tensors_beside_frozen_ones_stay_as_they_are():
    class Augment(nn.Module):
        def forward(self, images):
            if not self.training:
                return images
            return images + torch.randn_like(images)

    class Flat(Net):
        def __init__(self):
            super().__init__(nn.Identity(), nn.Identity())
            self.augment = Augment()
            self.first = nn.Linear(8, 16)
            self.drop1 = nn.Dropout(0.5)
            self.second = nn.Linear(16, 16)
            self.drop2 = nn.Dropout(0.5)
            self.last = nn.Linear(16, 3)

        def training_step(self, batch, batch_idx):
            hidden = self.second(self.drop1(self.first(self.augment(batch[0]))))
            return F.cross_entropy(self.last(self.drop2(hidden)), batch[1])

    watch = fit(Flat(), freeze(frozen=["first", "second"]))
    assert watch.eval[0] == {"first", "second"}
    assert watch.eval[STEPS] == set()


def test_modules_that_were_put_in_eval_mode_stay_there():
    module = Net()
    module.backbone[1].eval()
    watch = fit(module, freeze())
    assert watch.moved("backbone.1.running_mean") == [False] * 3
    assert watch.eval[STEPS] == {"backbone.1"}


class Tied(Net):
    """A head whose weight is the backbone's."""

    def __init__(self):
        backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        super().__init__(backbone, nn.Linear(8, 8))
        self.head.weight = self.backbone[2].weight


@pytest.mark.parametrize("frozen", [["backbone"], [r"backbone\.2"], ["head"]])
def test_tied_weights_are_frozen_if_any_of_their_names_is(frozen):
    watch = fit(Tied(), freeze(frozen=frozen))
    assert watch.moved("backbone.2.weight") == [False, True, True]
    assert watch.moved("head.weight") == [False, True, True]
    assert watch.moved("head.bias") == [frozen != ["head"], True, True]
    assert watch.moved("backbone.0.weight") == [frozen != ["backbone"], True, True]


def test_tied_weights_train_in_a_phase_as_soon_as_one_of_their_names_does():
    phases = [Phase("head"), Phase("all", epoch=1)]
    watch = fit(Tied(), BackboneFreeze(phases=phases))
    assert watch.moved("backbone.2.weight") == [True] * 3
    assert watch.moved("backbone.2.bias") == [False, True, True]


def test_a_text_is_one_pattern_one_stage_or_one_head():
    trains = fit(Net(), BackboneFreeze(1, frozen="backbone")).trains[0]
    assert trains == {"head.weight", "head.bias"}
    module = Net()
    module.heads = "head"
    assert fit(module, BackboneFreeze(1)).trains[0] == trains
    assert fit(Net(), BackboneFreeze(phases=Phase("head"))).trains[0] == trains


@pytest.mark.parametrize(
    "pattern", ["(?i)BACKBONE", "(back)(?:bone)", r"(?P<name>back)bone\.[03]|backbone\.1", "back|b"]
)
def test_a_pattern_may_have_flags_groups_and_alternatives(pattern):
    watch = fit(Net(), freeze(frozen=["nothing|head.bias", pattern]))
    assert watch.trains[0] == {"head.weight"}


def test_each_pattern_must_freeze_something():
    with pytest.raises(UserError, match="No parameter's name begins with 'back_bone'"):
        fit(Net(), freeze(frozen=["backbone", "back_bone"]))


def test_a_list_of_phases_holds_phases():
    with pytest.raises(UserError, match=r"phases has \{'train': \['head'\]\}: give .* Phase"):
        BackboneFreeze(phases=[{"train": ["head"]}])


def test_a_compiled_network_has_its_heads():
    class Compiled(LightningModule):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)]
            self.network = torch.compile(nn.Sequential(*layers), backend="eager")
            self.heads = ["2"]

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters(), 0.01)

    watch = fit(Compiled(), BackboneFreeze(1))
    assert watch.trains[0] == {"network._orig_mod.2.weight", "network._orig_mod.2.bias"}
    watch = fit(Compiled(), BackboneFreeze(1, frozen=r"network\.0"))
    assert watch.trains[0] == {"network._orig_mod.2.weight", "network._orig_mod.2.bias"}


def test_a_lazy_layer_is_refused_in_a_sentence():
    module = Net(head=nn.LazyLinear(3))
    with pytest.raises(UserError, match=r"head.weight is of a lazy layer.* pass a batch"):
        fit(module, freeze())


@pytest.mark.parametrize("heads", [["head"], ("head",)])
def test_heads_of_a_module_without_a_network_are_its_submodules(heads):
    module = Net()
    module.heads = heads
    assert fit(module, BackboneFreeze(1)).trains[0] == {"head.weight", "head.bias"}


def test_heads_may_be_submodules_beside_a_network():
    module = Net()
    module.network = nn.Linear(2, 2)
    module.heads = ["head"]
    assert fit(module, BackboneFreeze(1)).trains[0] == {"head.weight", "head.bias"}


def test_heads_that_are_no_submodules_are_refused():
    module = Net()
    module.heads = ["classifier"]
    with pytest.raises(
        UserError, match="heads names 'classifier', which is none of its submodules"
    ):
        fit(module, BackboneFreeze(1))
    module.heads = nn.ModuleList()  # an attribute of this name with another meaning
    with pytest.raises(UserError, match="names no head"):
        fit(module, BackboneFreeze(1))


def test_one_callback_serves_several_fits_as_in_cross_validation():
    callback = freeze()
    first = fit(Net(), callback)
    assert first.moved("backbone.0.weight") == [False, True, True]
    for _ in range(2):
        watch = fit(Net(), callback)
        assert watch.moved("backbone.0.weight") == [False, True, True]
        assert watch.rates == first.rates
        assert watch.eval == first.eval


def test_a_module_that_another_callback_left_frozen_is_unfrozen():
    module = Net()
    fit(module, freeze(99))
    with pytest.raises(ZeroDivisionError, match="by Fault"):
        fit(module, freeze(99), callbacks=[Fault()])
    assert fit(module, freeze(0)).moved("backbone.0.weight") == [True] * 3


class Fault(Callback):
    def on_train_batch_end(self, *args):
        raise ZeroDivisionError("by Fault")


def test_two_callbacks_in_one_trainer_are_refused():
    class Subclass(BackboneFreeze):
        pass

    with pytest.raises(RuntimeError, match="more than one stateful callback of type"):
        fit(Net(), freeze(), callbacks=[freeze()])
    with pytest.raises(
        UserError, match="several BackboneFreeze callbacks: give one of them phases"
    ):
        fit(Net(), freeze(), callbacks=[Subclass(1, frozen=["backbone"])])


def test_several_optimizers_with_manual_optimization():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [Adam(self.backbone.parameters(), 0.01), Adam(self.head.parameters(), 0.02)]

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in optimizers:
                optimizer.step()

    watch = fit(Manual(), freeze())
    assert watch.moved("backbone.0.weight") == [False, True, True]
    assert watch.rates[0] == [0.01, 0.02]
    assert watch.rates[STEPS] == [1e-4, 1e-4]


@pytest.mark.parametrize(
    "kind", ["LBFGS", "LayerNorm", "weight_norm", "spectral_norm", "shared", "compiled"]
)
def test_unusual_modules_and_optimizers_freeze_and_unfreeze(kind):
    layer = nn.Linear(16, 16)
    layers = [layer]
    if kind == "LayerNorm":
        layers = [nn.LayerNorm(16), layer]
    if kind == "weight_norm":
        layers = [nn.utils.parametrizations.weight_norm(layer)]
    if kind == "spectral_norm":
        layers = [nn.utils.parametrizations.spectral_norm(layer)]
    if kind == "shared":
        layers = [layer, nn.ReLU(), layer]
    module = Net(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *layers))
    if kind == "LBFGS":
        module.make = lambda module: torch.optim.LBFGS(module.parameters(), 0.01)
    if kind == "compiled":
        module.backbone.compile(backend="aot_eager")
    watch = fit(module, freeze())
    for name, _ in module.backbone.named_parameters():
        assert watch.moved(f"backbone.{name}") == [False, True, True], name
    for name, _ in module.backbone.named_buffers():  # of spectral_norm's power iteration
        assert watch.moved(f"backbone.{name}")[0] is False, name


def test_gradual_unfreezing_of_all_layers_before_the_last_epoch_can_be_continued(tmp_path):
    """Lightning's callback ends with an IndexError when such a run is continued."""
    phases = [
        Phase(["head"]),
        Phase([r"backbone\.3\."], 1),
        Phase([r"backbone\.2\."], 2),
        Phase([r"backbone\.1\."], 3),
        Phase([r"backbone\.0\."], 4),
    ]

    def four_layers():
        backbone = nn.Sequential(
            nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        )
        return Net(backbone, optimizer=trainable)

    def trained_layers(watch):
        return [len(names) // 2 for names in watch.trains[::STEPS]]

    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(four_layers(), BackboneFreeze(phases=phases), 7, [keep])
    assert trained_layers(whole) == [1, 2, 3, 4, 5, 5, 5, 5]
    checkpoint = tmp_path / "epoch=2.ckpt"
    rest = fit(four_layers(), BackboneFreeze(phases=phases), 7, ckpt_path=checkpoint)
    assert trained_layers(rest) == [4, 5, 5, 5, 5]
    for name, value in whole.weights[-1].items():
        assert torch.equal(value, rest.weights[-1][name]), name


def test_modules_with_parameters_and_submodules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"linear": nn.Linear(8, 16), "act": nn.ReLU()})
            self.shift = nn.Parameter(torch.zeros(1))
            self.norm = nn.BatchNorm1d(16)

        def forward(self, images):
            return self.norm(self.parts["act"](self.parts["linear"](images)) + self.shift)

    watch = fit(Net(nn.Sequential(Block())), freeze())
    for name in ("parts.linear.weight", "shift", "norm.weight", "norm.running_var"):
        assert watch.moved(f"backbone.0.{name}") == [False, True, True], name


def test_parameters_of_configure_model_are_frozen_too():
    class Late(Net):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = nn.Linear(8, 8)

        def training_step(self, batch, batch_idx):
            return super().training_step((self.late(batch[0]), batch[1]), batch_idx)

    watch = fit(Late(), freeze(frozen=["late", "backbone"]))
    assert watch.moved("late.weight") == [False, True, True]


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = textwrap.dedent(BackboneFreeze.__doc__.partition("Example::")[2])
    names = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "models": models,
        "LightningModule": LightningModule,
        "BackboneFreeze": BackboneFreeze,
        "ShapesDataModule": ShapesDataModule,
        "Trainer": quiet_trainer,
    }
    exec(example, names)
    assert (
        "Epoch 2: everything at rate 0.0001, 11,209,994 parameters train.\n"
        in capsys.readouterr().out
    )
