"""`BackboneFreeze` under every schedule of torch: it keeps its curve, or is refused by name."""

import copy

import pytest
from lightning import seed_everything
from others import STEPS, Net, fit, freeze
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from cifar_transfer import BackboneFreeze, Phase
from cifar_transfer.base.errors import UserError

SCHEDULES = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 - step / 40),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.98),
    "StepLR": lambda o: schedules.StepLR(o, 5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 9]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 9),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1, 9),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 20, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-3, 1e-2, 4),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=20),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1, 6), schedules.CosineAnnealingLR(o, 12)], [6]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.1, 1, 6), schedules.ExponentialLR(o, 0.97)]
    ),
    "SWALR": lambda o: SWALR(o, 5e-3, 6),
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
    whole, plan = (
        Net(optimizer=groups, schedule=SCHEDULES[name]),
        [Phase(["head"]), Phase(["backbone"], 1, lr=1e-4)],
    )
    plain = fit(copy.deepcopy(whole), BackboneFreeze(0), 4)
    watch = fit(copy.deepcopy(whole), BackboneFreeze(phases=[*plan, Phase(["all"], 2, lr=5e-5)]), 4)
    for step, (rates, before) in enumerate(zip(watch.rates, plain.rates, strict=True)):
        share = (1, 0.01, 0.005, 0.005, 0.005)[step // STEPS]
        assert rates == pytest.approx([before[0] * share, before[1]], rel=1e-9), step
    assert max(before[0] for before in plain.rates) <= 0.01 * (1 + 1e-9), (
        "which is where it leads up to"
    )


def test_a_plateau_takes_the_rate_and_starts_afresh():
    def plateau(optimizer):
        return schedules.ReduceLROnPlateau(optimizer, patience=0)

    class Loss(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", 1.0)  # never better
            return loss

        def configure_optimizers(self):
            made = self.make(self)
            return {
                "optimizer": made,
                "lr_scheduler": {"scheduler": plateau(made), "monitor": "loss"},
            }

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
