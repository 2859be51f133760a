"""`BackboneFreeze` under every schedule of torch: it keeps its curve, or is refused by name."""

import copy
from functools import partial

import pytest
from lightning import seed_everything
from others import STEPS, Net, fit, freeze
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from cifar_transfer import BackboneFreeze, Phase
from cifar_transfer.base.errors import UserError


def falling(step):
    return 1 - step / 40


def always(step):
    return 0.98


def sequential(optimizer):
    parts = [schedules.LinearLR(optimizer, 0.1, 1, 6), schedules.CosineAnnealingLR(optimizer, 12)]
    return schedules.SequentialLR(optimizer, parts, [6])


def chained(optimizer):
    parts = [schedules.LinearLR(optimizer, 0.1, 1, 6), schedules.ExponentialLR(optimizer, 0.97)]
    return schedules.ChainedScheduler(parts)


SCHEDULES = {
    "LambdaLR": partial(schedules.LambdaLR, lr_lambda=falling),
    "MultiplicativeLR": partial(schedules.MultiplicativeLR, lr_lambda=always),
    "StepLR": partial(schedules.StepLR, step_size=5),
    "MultiStepLR": partial(schedules.MultiStepLR, milestones=[2, 9]),
    "ConstantLR": partial(schedules.ConstantLR, factor=0.5, total_iters=9),
    "LinearLR": partial(schedules.LinearLR, start_factor=0.1, end_factor=1, total_iters=9),
    "ExponentialLR": partial(schedules.ExponentialLR, gamma=0.97),
    "PolynomialLR": partial(schedules.PolynomialLR, total_iters=20, power=2.0),
    "CosineAnnealingLR": partial(schedules.CosineAnnealingLR, T_max=20),
    "CosineAnnealingWarmRestarts": partial(schedules.CosineAnnealingWarmRestarts, T_0=5),
    "CyclicLR": partial(schedules.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=4),
    "OneCycleLR": partial(schedules.OneCycleLR, max_lr=1e-2, total_steps=20),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": partial(SWALR, swa_lr=5e-3, anneal_epochs=6),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_torch_keeps_its_curve_and_leads_to_the_phases_rate(name):
    def groups(module):
        parts = [
            {"params": module.backbone.parameters()},
            {"params": module.head.parameters(), "name": "head"},
        ]
        return SGD(parts, 0.01, momentum=0.9)

    seed_everything(0)
    module = Net(optimizer=groups, schedule=SCHEDULES[name])
    same_module = copy.deepcopy(module)
    plan = [Phase(["head"]), Phase(["backbone"], 1, lr=1e-4), Phase(["all"], 2, lr=5e-5)]
    plain = fit(module, BackboneFreeze(0), 4)
    watch = fit(same_module, BackboneFreeze(phases=plan), 4)
    for step, (rates, plain_rates) in enumerate(zip(watch.rates, plain.rates, strict=True)):
        share = (1, 0.01, 0.005, 0.005, 0.005)[step // STEPS]
        assert rates == pytest.approx([plain_rates[0] * share, plain_rates[1]], rel=1e-9), step
    highest = max(plain_rates[0] for plain_rates in plain.rates)
    assert highest <= 0.01 * (1 + 1e-9), "which is where it leads up to"


def test_a_plateau_takes_the_rate_and_starts_afresh():
    def plateau(optimizer):
        return schedules.ReduceLROnPlateau(optimizer, patience=0)

    class Loss(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", 1.0)  # never better
            return loss

        def configure_optimizers(self):
            optimizer = self.make(self)
            config = {"scheduler": plateau(optimizer), "monitor": "loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    rates = [rates[0] for rates in fit(Loss(), freeze(2), 4).rates[::STEPS]]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-4, 1e-4, 1e-5])


def test_schedules_that_would_undo_the_rate_are_refused_by_name():
    class Others:
        """As timm's are."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            raise AssertionError

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise AssertionError

    module = Net(schedule=Others)
    module.lr_scheduler_step = lambda scheduler, metric: None
    with pytest.raises(UserError, match="Others is not of torch"):
        fit(module, freeze())
    fit(module, freeze(unfrozen_lr=None))
    with pytest.raises(
        UserError, match=r"CosineAnnealingLR goes to eta_min=0.001, which is above .* 0.0001"
    ):
        fit(Net(schedule=lambda o: schedules.CosineAnnealingLR(o, 20, eta_min=1e-3)), freeze())
