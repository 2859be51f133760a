"""Lightning's Tuner and its callbacks: they put a module back by checkpoints of their own."""

import pytest
from conftest import quiet_trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from cifar_transfer import ShapesDataModule, TransferClassifier


@pytest.fixture(autouse=True)
def _work_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parts(train_images, **options):
    """Return a trainer, a module and data with batches of 8."""
    data = ShapesDataModule(train_images=train_images, test_images=10, batch_size=8)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    return quiet_trainer(max_epochs=1, **options), model, data


def is_trained_with(data, batch_size):
    images, _ = next(iter(data.train_dataloader()))
    return data.batch_size == data.hparams.batch_size == len(images) == batch_size


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_size_of_batches_is_found_and_taken(tmp_path):
    trainer, model, data = parts(60)
    found = Tuner(trainer).scale_batch_size(model, data, max_trials=2, steps_per_trial=1)
    assert found == 4
    assert is_trained_with(data, 4)
    trainer.fit(model, data)
    trainer, model, data = parts(60, callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=1)])
    trainer.fit(model, data)
    assert is_trained_with(data, 4)
    assert list(tmp_path.rglob("*.ckpt")) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_learning_rate_is_found_and_trained_with(tmp_path):
    trainer, model, data = parts(200)
    finder = Tuner(trainer).lr_find(model, data, num_training=14, early_stop_threshold=None)
    found = finder.suggestion()
    assert found not in (None, 1e-3)
    trainer.fit(model, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.hparams["lr"] == found
    search = LearningRateFinder(num_training_steps=14, early_stop_threshold=None)
    trainer, model, data = parts(200, callbacks=[search])
    trainer.fit(model, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == search.optimal_lr.suggestion()
    assert list(tmp_path.rglob("*.ckpt")) == []
