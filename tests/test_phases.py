"""Phases: which stage begins to train when, at which rate, from which weights, and resumed."""

import json
import logging
import re
from pathlib import Path

import others
import pytest
import torch
from conftest import TINY, assert_same_weights, curves, quiet_trainer, run_fit, untouched
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torchvision import models

from cifar_transfer import Augment, BackboneFreeze, Phase, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.training.phases import check_phases, names_to_train, stages_of

STAGES = ["stem", "stage2", "stage3", "stage4", "conv5", "head"]  # of ShuffleNet


class Watch(Callback):
    """Note in each epoch which stages train, their rates, and the head before the first step."""

    def __init__(self):
        self.stages, self.rates, self.heads = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.heads.append(module.network.fc.weight.detach().clone())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 0:
            trains = {name for name, p in module.network.named_parameters() if p.requires_grad}
            self.stages.append(
                [stage for stage, names in module.stages.items() if trains & set(names)]
            )
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class Say(Callback):
    """Log the figures of a list in validation, one in each epoch."""

    def __init__(self, figures):
        self.figures = iter(figures)

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            module.log("figure", next(self.figures))


def fit(tmp_path, freeze, epochs, *callbacks, ckpt_path=None, model=None, **options):
    seed_everything(0)
    data = ShapesDataModule(train_images=80, test_images=40, batch_size=32, augment=Augment())
    module = TransferClassifier(
        "shufflenet_v2_x0_5", "none", class_names=data.class_names, **model or {}
    )
    watch = Watch()
    options = {"max_epochs": epochs, "default_root_dir": tmp_path} | options
    quiet_trainer(callbacks=[*callbacks, freeze, watch], **options).fit(
        module, data, ckpt_path=ckpt_path
    )
    return watch, module


def test_gradual_unfreezes_a_stage_an_epoch_from_the_head_down(tmp_path):
    watch, _ = fit(tmp_path, BackboneFreeze(phases="gradual", unfrozen_lr=1e-4), 7)
    assert watch.stages == [STAGES[-n:] for n in (1, 2, 3, 4, 5, 6, 6)]
    assert [rates[0] for rates in watch.rates] == [1e-3, *[1e-4] * 6]


def test_gradual_trains_a_network_that_is_all_head(tmp_path):
    class Head(others.Net):
        heads = ("backbone", "head")

    watch = others.fit(Head(), BackboneFreeze(phases="gradual"), 2)
    assert watch.trains[0] == {name for name, _ in Head().named_parameters()}


def test_what_no_phase_names_stays_frozen_and_is_told_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    freeze = BackboneFreeze(phases=[Phase(["stage4", "conv5", "head"])])
    watch, module = fit(tmp_path, freeze, 2)
    assert watch.stages == [["stage4", "conv5", "head"]] * 2
    told = [message for message in caplog.messages if "no phase trains them" in message]
    frozen = [
        name for name, _ in module.named_parameters() if re.search("conv1|stage2|stage3", name)
    ]
    reason = "stay frozen, because no phase trains them"
    assert told == [f"{len(frozen)} tensors of parameters, such as {frozen[0]}, {reason}."]


def test_phases_begin_at_their_epochs_and_set_the_rate_or_leave_it(tmp_path):
    plan = [
        Phase(["head"]),
        Phase(["conv5", r"network\.stage4\.0"], epoch=1, lr=2e-4),
        Phase(["all"], epoch=3),
    ]
    watch, _ = fit(tmp_path, BackboneFreeze(phases=plan), 5, limit_val_batches=0)
    assert watch.stages == [["head"], *[["stage4", "conv5", "head"]] * 2, *[STAGES] * 2]
    assert [rates[0] for rates in watch.rates] == [1e-3, 2e-4, 2e-4, 2e-4, 2e-4]


@pytest.mark.parametrize(
    ("mode", "figures"),
    [("min", [3, 2, 2, 2.5, 9, 9.5, 8, 8]), ("max", [1, 2, 2, 1.5, 0, -1, 1, 1])],
)
def test_a_phase_waits_until_the_figure_of_the_one_before_no_longer_improves(
    tmp_path, mode, figures
):
    plan = [Phase(["head"]), Phase(["conv5"], patience=2), Phase(["all"], patience=1)]
    freeze = BackboneFreeze(phases=plan, monitor="figure", mode=mode)
    watch, _ = fit(tmp_path, freeze, 8, Say(figures))
    # The fourth is the second without a better one. The fifth is the first of its phase, and the
    # sixth is worse.
    assert [len(stages) for stages in watch.stages] == [1, 1, 1, 1, 2, 2, 6, 6]


def test_a_resumed_run_has_waited_as_long_as_the_run_that_was_stopped(tmp_path):
    plan = [Phase(["head"]), Phase(["all"], patience=2)]
    figures = [3.0, 1.0, 2.0, 2.0, 2.0]

    def run(figures, **options):
        freeze = BackboneFreeze(phases=plan, monitor="figure")
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        return fit(tmp_path, freeze, 5, keep, Say(figures), **options)[0].stages

    assert [len(stages) for stages in run(figures)] == [1, 1, 1, 1, 6]
    rest = run(figures[3:], ckpt_path=tmp_path / "epoch=2.ckpt")
    assert [len(stages) for stages in rest] == [1, 6]


def test_a_later_phase_with_an_epoch_does_not_wait_for_the_one_before(tmp_path):
    plan = [Phase(["head"]), Phase(["conv5"], patience=9), Phase(["stage4"], epoch=2)]
    watch, _ = fit(tmp_path, BackboneFreeze(phases=plan), 3)
    assert [len(stages) for stages in watch.stages] == [1, 1, 3]


def test_a_figure_that_is_not_logged_is_told_with_those_that_are(tmp_path):
    plan = [Phase(["head"]), Phase(["all"], patience=2)]
    with pytest.raises(
        UserError, match=r"monitor=val/accuracy is not logged in validation.*val/acc"
    ):
        fit(tmp_path, BackboneFreeze(phases=plan, monitor="val/accuracy"), 2)


def test_a_phase_may_begin_from_the_best_weights(tmp_path):
    plan = [Phase(["head"]), Phase(["all"], epoch=3, from_best=True)]
    best = ModelCheckpoint(tmp_path, "best", monitor="figure", mode="max")
    watch, _ = fit(tmp_path, BackboneFreeze(phases=plan), 4, Say([0.1, 0.9, 0.2, 0.3]), best)
    assert torch.equal(watch.heads[3], watch.heads[2]), "those at the end of the second epoch"
    with pytest.raises(UserError, match="from_best needs a ModelCheckpoint"):
        fit(tmp_path, BackboneFreeze(phases=plan), 4)


class Validated(Callback):
    """Notes the head that each epoch validates."""

    def __init__(self):
        self.heads = []

    def on_validation_batch_end(self, trainer, module, *_):
        if not trainer.sanity_checking:
            self.heads.append(module.network.fc.weight.detach().clone())


def test_a_phase_from_the_best_weights_has_their_average(tmp_path):
    plan = [
        Phase(["head"]),
        Phase(["all"], epoch=3, from_best=True, lr=1e-12),
    ]  # which moves nothing
    best = ModelCheckpoint(tmp_path, "best", monitor="figure", mode="max")
    validated = Validated()
    figures = Say([0.1, 0.9, 0.2, 0.3])
    freeze = BackboneFreeze(phases=plan)
    fit(tmp_path, freeze, 4, figures, best, validated, model={"ema": 0.9, "lr": 0.01})
    _, second, third, fourth = validated.heads
    torch.testing.assert_close(fourth, second, rtol=0, atol=1e-7)
    assert not torch.allclose(third, second, rtol=0, atol=1e-4)


def test_a_phase_that_finds_no_best_weights_says_so(tmp_path):
    plan = [Phase(["head"]), Phase(["all"], epoch=1, from_best=True)]
    best = ModelCheckpoint(tmp_path, "best", monitor="val/acc", mode="max")
    with pytest.warns(UserWarning, match="from_best finds no checkpoint that was the best so far"):
        fit(tmp_path, BackboneFreeze(phases=plan), 2, best, check_val_every_n_epoch=5)


def test_layer_decay_lets_rates_fall_from_head_to_stem_in_every_phase(tmp_path):
    watch, _ = fit(
        tmp_path, BackboneFreeze(1, 1e-4), 2, model={"layer_decay": 0.5, "schedule": "plateau"}
    )
    shares = [0.5**n for n in (5, 4, 3, 2, 1, 0)]
    assert watch.rates == [
        pytest.approx([1e-3 * share for share in shares]),
        [1e-4 * share for share in shares],
    ]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["plateau", "linear", "cosine"])
def test_layer_decay_keeps_its_ratios_under_every_schedule_and_beside_a_head_rate(
    tmp_path, optimizer, schedule
):
    model = {"layer_decay": 0.75, "optimizer": optimizer, "schedule": schedule, "head_lr": 2e-3}
    watch, _ = fit(tmp_path, BackboneFreeze(1, 1e-4), 3, model=model)
    for rates in watch.rates:
        for depth, rate in enumerate(reversed(rates[:-1])):
            assert rate == pytest.approx(rates[-2] * 0.75**depth, rel=1e-12)
    assert watch.rates[0][-1] > watch.rates[0][-2]
    assert watch.rates[1][-1] > 10 * watch.rates[1][-2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('[{"train": []}]', r"train is \[\]: take a list of stages or patterns"),
        ('[{"train": ["head"], "epoch": 2}]', "first phase begins with the run"),
        ('[{"train": ["head"]}, {"train": ["all"]}]', "by an epoch or by a patience"),
        (
            '[{"train": ["head"]}, {"train": ["all"], "epoch": 1, "patience": 2}]',
            "by an epoch or by a patience",
        ),
        (
            '[{"train": ["head"]}, {"train": ["all"], "epoch": 1, "lr": -1}]',
            "lr is -1.0: take a positive rate",
        ),
        (
            '[{"train": ["head"]}, {"train": ["all"], "epoch": 3}, {"train": ["all"], "epoch": 2}]',
            r"epochs \[3, 2\]",
        ),
        (
            '[{"train": ["head"]}, {"train": ["layer9"], "epoch": 1}]',
            "'layer9' is no stage .stem, stage2, stage3",
        ),
        ('[{"train": ["fc("]}]', "not a regular expression"),
        ('[{"train": ["head"], "when": 3}]', "when"),
        ("[]", "one or more"),
        ("sudden", "sudden"),
    ],
)
def test_plans_that_cannot_be_are_refused_before_anything_is_written(tmp_path, options, message):
    with untouched(tmp_path):
        done = run_fit(
            tmp_path, *TINY, f"--freeze.phases={options}", "--trainer.max_epochs=4", expect=2
        )
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.whole
def test_a_run_shows_its_stages_and_continues_in_its_phase(tmp_path):
    plan = [
        {"train": ["head"]},
        {"train": ["conv5"], "epoch": 1, "lr": 2e-4},
        {"train": ["all"], "epoch": 2},
    ]
    options = [
        *TINY,
        "--report.figures=true",
        f"--freeze.phases={json.dumps(plan)}",
        "--trainer.max_epochs=3",
    ]
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder, more in (
        (whole, []),
        (part, ["--trainer.max_steps=8"]),
    ):  # within the second of three epochs of six
        folder.mkdir()
        run_fit(folder, *options, *more)
    told = run_fit(part, "--resume=lightning_logs/version_0", "--trainer.max_steps=-1").stdout
    phases = re.findall("^(Epoch.*) parameters train", told, re.MULTILINE)
    assert [phase.partition(":")[0] for phase in phases] == ["Epoch 2", "Epoch 3"], told
    assert "conv5" in phases[0]
    runs = [folder / "lightning_logs" / "version_0" for folder in (whole, part)]
    assert_same_weights(*(run / "checkpoints" / "last.ckpt" for run in runs))
    found = [
        {tag: p for tag, p in curves(run).items() if tag.startswith("stages/")} for run in runs
    ]
    rates = {
        tag.removeprefix("stages/"): [value for _, value in points]
        for tag, points in found[0].items()
    }
    assert rates["stem"] == pytest.approx([0, 0, 2e-4])
    assert rates["conv5"] == pytest.approx([0, 2e-4, 2e-4])
    assert rates["head"] == pytest.approx([1e-3, 2e-4, 2e-4])
    assert found[0] == found[1]
    assert (runs[0] / "figures" / "stages.png").read_bytes() == (
        runs[1] / "figures" / "stages.png"
    ).read_bytes()
    with untouched(part):
        changed = json.dumps([*plan[:2], {"train": ["all"], "epoch": 5}])
        done = run_fit(
            part,
            f"--resume={runs[1]}",
            f"--freeze.phases={changed}",
            "--trainer.max_epochs=9",
            expect=2,
        )
    assert "with which the run began" in done.stderr
    assert '"epoch": 5' in done.stderr or "'epoch': 5" in done.stderr


class Wrapper(torch.nn.Module):
    """A module around a network, as a classifier with its preprocessing is."""

    def __init__(self, network):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.network = network


class Wrapped(LightningModule):
    """A module whose network is a property, registered under another name."""

    def __init__(self, network, heads=("fc",)):
        super().__init__()
        self.classifier = Wrapper(network)
        self.heads = heads

    @property
    def network(self):
        return self.classifier.network


def names_of(module, *train):
    return names_to_train(module, train, stages_of(module))


def test_stages_of_a_network_that_a_property_returns():
    module = Wrapped(models.resnet18())
    stages = stages_of(module)
    assert list(stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert stages["head"] == ["classifier.network.fc.weight", "classifier.network.fc.bias"]
    names = {name for names in stages.values() for name in names}
    assert names == set(module.state_dict()) - {"classifier.scale"}
    assert names_of(module, "all") == set(module.state_dict())


def test_a_pattern_may_call_the_network_by_its_attribute_or_by_its_place():
    module = Wrapped(models.resnet18())
    head = {"classifier.network.fc.weight", "classifier.network.fc.bias"}
    assert names_of(module, r"network\.fc\.") == head
    assert names_of(module, r"classifier\.network\.fc\.") == head
    assert names_of(module, "head") == head
    assert names_of(module, "classifier.scale") == {"classifier.scale"}
    with pytest.raises(UserError, match=r"'fc' is no stage .*no parameter's name begins with it"):
        names_of(module, "fc")


@pytest.mark.parametrize("pattern", [r"network\.layer[1-4]\.", r"classifier\.network\.layer[1-4]"])
def test_patterns_of_what_is_frozen_may_call_it_so_too(pattern):
    module = Wrapped(models.resnet18())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    freeze = BackboneFreeze(unfreeze_epoch=1, frozen=[pattern])
    freeze.on_fit_start(quiet_trainer(), module)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in module.named_parameters() if ".layer" in name}


def test_a_network_that_the_module_does_not_contain_is_none_of_its_own():
    class Borrowed(LightningModule):
        network = property(lambda self: models.squeezenet1_0())

        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Linear(2, 2)
            self.head = torch.nn.Linear(2, 2)
            self.heads = ["head"]

    stages = stages_of(Borrowed())
    assert stages["head"] == ["head.weight", "head.bias"]
    assert {name for names in stages.values() for name in names} == {
        *("head.weight", "head.bias", "backbone.weight", "backbone.bias")
    }


def test_the_phases_of_the_documents_are_plans_for_resnet18():
    recipes = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
    text = recipes.read_text().replace("\n", " ")
    plans = []
    for plan in re.findall(r"'(\[\{\"train\".*?\}\])'", text):
        plans.append([Phase(**phase) for phase in json.loads(plan)])
    assert len(plans) == 3
    module = TransferClassifier("resnet18", "none")
    for plan in plans:
        check_phases(plan)
        assert names_to_train(module, plan[0].train, stages_of(module))
    (forever,) = [plan for plan in plans if len(plan) == 1]
    trained = names_to_train(module, forever[0].train, stages_of(module))
    convolutions = [
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Conv2d)
    ]
    frozen = [name for name in convolutions if name not in trained]
    assert frozen == convolutions[:10], "what it says of them"
