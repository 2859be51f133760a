"""What Lightning, torch and jsonargparse do not promise: these tests fail when it changes."""

import pytest
from conftest import quiet_trainer
from lightning.pytorch.demos.boring_classes import BoringModel

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
