"""What Lightning, torch and jsonargparse do not promise: these tests fail when it changes."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, lr_scheduler

from cifar_transfer.training import lightning_internals


class Model(BoringModel):
    """A module that notes, while it fits, what is known of its trainer."""

    def on_validation_start(self):
        self.fitting_in_validation = lightning_internals.is_fitting(self)


def test_a_module_without_a_trainer_has_none():
    model = Model()
    assert lightning_internals.trainer_of(model) is None
    assert not lightning_internals.is_fitting(model)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = model.trainer


def test_a_module_fits_also_while_it_validates():
    model = Model()
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(model)
    assert lightning_internals.trainer_of(model) is trainer
    assert model.fitting_in_validation
    trainer.validate(model, verbose=False)
    assert not model.fitting_in_validation


def test_a_trainer_lists_its_callbacks():
    trainer = quiet_trainer()
    assert lightning_internals.callbacks_of(trainer) == trainer.callbacks


class LogsInEachStep(Model):
    """A module that logs in each step, and lowers the interval of the log before the first one."""

    def on_train_start(self):
        self.interval_before = lightning_internals.log_interval(self.trainer)
        lightning_internals.set_log_interval(self.trainer, 2)

    def training_step(self, batch, batch_idx):
        self.log("figure", 1.0)
        return super().training_step(batch, batch_idx)


def test_the_interval_of_the_log_can_be_changed_when_a_fit_has_begun(tmp_path):
    model = LogsInEachStep()
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(max_steps=6, limit_val_batches=0, log_every_n_steps=4, logger=logger)
    trainer.fit(model)
    assert model.interval_before == 4
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3", "5"]


class Counts(Model):
    """A module that notes how many batches an epoch has, before and after they are counted."""

    def configure_optimizers(self):
        before = self.trainer.num_training_batches
        self.counts = [before, lightning_internals.count_training_batches(self.trainer)]
        return super().configure_optimizers()


def test_batches_are_counted_before_the_loop_has_set_up_the_data():
    model = Counts()
    quiet_trainer(max_steps=1, limit_train_batches=3, limit_val_batches=0).fit(model)
    assert model.counts == [float("inf"), 3]


def test_schedulers_within_others_are_found():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.1)
    first = lr_scheduler.LinearLR(optimizer)
    second = lr_scheduler.ExponentialLR(optimizer, 0.9)
    chained = lr_scheduler.ChainedScheduler([first, second])
    optimizer.step()
    sequence = lr_scheduler.SequentialLR(
        optimizer, [chained, lr_scheduler.StepLR(optimizer, 1)], [9]
    )
    within = [type(part).__name__ for part in lightning_internals.schedulers_within(sequence)]
    assert within == ["SequentialLR", "ChainedScheduler", "LinearLR", "ExponentialLR", "StepLR"]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_a_plateau_is_reset_as_it_resets_itself(mode, epochs):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.1)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=1, cooldown=2)
    for _ in range(epochs):
        plateau.step(1.0)
    expected = copy.copy(plateau)
    expected._reset()
    assert vars(plateau) != vars(expected)
    lightning_internals.reset_plateau(plateau)
    assert vars(plateau) == vars(expected)


class Frozen(Model):
    """A module that freezes its bias after it was wrapped, and then has itself wrapped or not."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def on_train_start(self):
        before = self.trainer.strategy.model
        assert isinstance(before, DistributedDataParallel)
        self.layer.bias.requires_grad_(False)
        if self.wrap:
            lightning_internals.wrap_again(self.trainer, self)
        after = self.trainer.strategy.model
        assert isinstance(after, DistributedDataParallel)
        assert (after is not before) == self.wrap
        assert after.module is self


@pytest.fixture
def one_process(monkeypatch):
    """A process group of one process, in which wrapped modules train."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # Lightning sets them; they are removed after the test
    yield quiet_trainer(strategy="ddp", devices=1, max_steps=2, limit_val_batches=0)
    torch.distributed.destroy_process_group()


def test_a_wrapper_waits_for_gradients_of_what_was_trainable_when_it_was_made(one_process):
    with pytest.raises(RuntimeError, match="parameters that were not used"):
        one_process.fit(Frozen(wrap=False))


def test_a_module_is_wrapped_again_without_what_is_frozen(one_process):
    one_process.fit(Frozen(wrap=True))
    assert one_process.global_step == 2


def test_a_module_that_was_not_wrapped_is_not_wrapped_again():
    model = Model()
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model)
    lightning_internals.wrap_again(trainer, model)
    assert trainer.strategy.model is model


def test_fused_sgd_needs_a_momentum_for_all_parameters_or_none():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD(parameters, 0.1, momentum=0.9, fused=True)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    parameters[1].grad = torch.ones(2)
    with pytest.raises(TypeError, match="expected Tensor"):
        optimizer.step()
    lightning_internals.complete_momentum(optimizer)
    optimizer.step()
    assert optimizer.state[parameters[1]]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_an_attached_module_is_saved_with_its_data_after_another_one_ran(tmp_path):
    class Data(BoringDataModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"root": "photos"}, logger=False)

    trainer = quiet_trainer(limit_test_batches=1)
    trainer.test(BoringModel(), verbose=False)
    model = BoringModel()
    lightning_internals.attach(trainer, model, Data())
    assert model.trainer.datamodule.hparams == {"root": "photos"}
    lightning_internals.save_attached(trainer, model, tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"], dict(model.state_dict()))
    assert checkpoint["datamodule_hyper_parameters"] == {"root": "photos"}
    assert "optimizer_states" not in checkpoint


@pytest.mark.parametrize(
    ("options", "temporary"),
    [
        ({"devices": 1}, False),
        ({"devices": 2, "strategy": "ddp"}, False),
        ({"devices": 2, "strategy": "ddp_spawn"}, True),
        ({"devices": 2, "strategy": "ddp_notebook"}, True),
    ],
)
def test_processes_that_end_with_a_function_are_known(options, temporary):
    trainer = quiet_trainer(**options)
    assert lightning_internals.has_temporary_processes(trainer) == temporary
