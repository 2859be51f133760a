"""`metrics.csv`: a row for each step and each epoch.

Runs that were stopped are in test_resume and test_killed.
"""

import pytest
from conftest import quiet_trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger

from cifar_transfer import ShapesDataModule, TransferClassifier
from cifar_transfer.training.metrics_file import MetricsFile, trim_metrics
from cifar_transfer.training.report import Report


def test_a_step_has_one_row_and_a_new_figure_a_column(tmp_path):
    file = MetricsFile(tmp_path)
    file.add(None, 0, {"lr-Adam": 0.5})
    file.add(1, 0, {"train/loss": 2.5})
    file.add(1, 1, {"train/loss": 2.25})
    file.flush()
    file.add(1, 1, {"lr": 0.5, "trainable_parameters": 10.0})
    file.flush()
    assert file.path.read_text().splitlines() == [
        "epoch,step,lr-Adam,train/loss,lr,trainable_parameters",
        "1,0,0.5,2.5,,",
        "1,1,,2.25,,",
        "1,1,,,0.5,10.0",
    ]


def test_what_will_be_logged_again_is_removed_with_what_was_cut_short(tmp_path):
    file = MetricsFile(tmp_path)
    for epoch, step in ((1, 0), (1, 1), (2, 2), (2, 3)):
        file.add(epoch, step, {"train/loss": 0.5})
        if step % 2:
            file.add(epoch, step, {"trainable_parameters": 10.0})
    file.flush()
    file.path.write_text(file.path.read_text() + "3,")
    trim_metrics(tmp_path, 1, 4)  # the second epoch was stopped before its end, by max_steps
    MetricsFile(tmp_path).flush()
    again = MetricsFile(tmp_path)
    again.add(2, 4, {"train/loss": 0.25})
    again.flush()
    rows = ["1,0,0.5,", "1,1,0.5,", "1,1,,10.0", "2,2,0.5,", "2,3,0.5,", "2,4,0.25,"]
    assert file.path.read_text().splitlines() == [
        "epoch,step,train/loss,trainable_parameters",
        *rows,
    ]
    trim_metrics(tmp_path, 0, 1)
    assert file.path.read_text().splitlines()[1:] == rows[:1]
    assert list(tmp_path.iterdir()) == [file.path]


@pytest.mark.parametrize(("asked", "done"), [(10, 1), (4, 4)])
def test_a_short_run_is_logged_more_often_unless_told_how_often(asked, done):
    data = ShapesDataModule(train_images=64, test_images=10, batch_size=32)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    trainer = quiet_trainer(
        max_epochs=1, log_every_n_steps=asked, callbacks=[Report(figures=False)]
    )
    trainer.fit(model, data)
    assert trainer.log_every_n_steps == done


class Witness(Logger):
    """A logger as others write them, which keeps what it is told."""

    name = "witness"
    version = 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args):
        pass


@pytest.mark.parametrize("validations", [1.0, 0.25], ids=["by epoch", "within epochs"])
def test_loggers_of_others_get_every_figure_at_the_step_of_the_optimizer(validations):
    """W&B ignores a step that is lower than the one before. A validation may come before any."""
    data = ShapesDataModule(train_images=160, test_images=10, batch_size=16)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    witness = Witness()
    trainer = quiet_trainer(
        max_epochs=2,
        logger=witness,
        log_every_n_steps=1,
        accumulate_grad_batches=4,
        val_check_interval=validations,
        callbacks=[LearningRateMonitor("step")],
    )
    trainer.fit(model, data)
    steps = [step for step, _ in witness.logged]
    assert steps == sorted(steps)
    assert steps[0] == 0
    by_epoch = [(step, figures) for step, figures in witness.logged if "steps" in figures]
    assert [step for step, _ in by_epoch] == [figures["steps"] for _, figures in by_epoch]
    assert [figures["epoch"] for _, figures in by_epoch] == [0, 1]
