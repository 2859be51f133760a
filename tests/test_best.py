"""Which checkpoint is the best: by which figure, in a tie, and after resuming."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RUN, quiet_trainer, untouched
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torchmetrics.classification import MulticlassF1Score

from cifar_transfer import Report, ShapesDataModule, TransferClassifier
from cifar_transfer.base.errors import UserError
from cifar_transfer.commands.fit import fit
from cifar_transfer.training.lightning_internals import is_fitting
from cifar_transfer.training.run import BEST, RunFolder
from cifar_transfer.training.run_checkpoints import RunCheckpoint, best_checkpoint_of

JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--data=ShapesDataModule",
    "--data.train_images=80",
    "--data.test_images=20",
    "--freeze.unfreeze_epoch=0",
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=1",
    "--report.figures=false",
]
BEST_FILE = Path(RUN, "checkpoints", "best.ckpt")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def validates_as(monkeypatch):
    """Let the validation of each epoch of a fit find an accuracy and a loss that are given."""
    real_step = TransferClassifier.validation_step

    def patch(figures):
        def validation_step(self, batch, batch_idx):
            if not is_fitting(self):
                return real_step(self, batch, batch_idx)
            accuracy, loss = figures[self.current_epoch]
            self.log("val/acc", accuracy, batch_size=1)
            self.log("val/loss", loss, batch_size=1)
            return None

        monkeypatch.setattr(TransferClassifier, "validation_step", validation_step)

    return patch


def stars(text):
    """Return the epochs that have a star in a table."""
    lines = [line for line in text.splitlines() if " *" in line]
    return [int(line.split("/")[0]) for line in lines]


def best_epoch():
    """Return the epoch of the best checkpoint, from 1."""
    return 1 + torch.load(BEST_FILE, weights_only=True)["epoch"]


@pytest.mark.parametrize(
    ("best", "figures", "expected"),
    [
        ("val/acc", [(0.4, 2.0), (0.4, 1.5), (0.4, 1.7), (0.4, 1.5)], [1, 2]),
        ("val/acc", [(0.4, 1.0), (0.5, 2.0), (0.4, 0.5)], [1, 2]),
        ("val/loss", [(0.4, 2.0), (0.3, 1.5), (0.9, 1.7), (0.2, 1.5)], [1, 2]),
    ],
)
def test_the_star_the_file_and_the_last_lines_agree(validates_as, capsys, best, figures, expected):
    validates_as(figures)
    outcome = fit([*JOB, f"--report.best={best}", f"--trainer.max_epochs={len(figures)}"])
    text = capsys.readouterr().out
    assert stars(text) == expected
    assert best_epoch() == expected[-1]
    assert f"the best{'' if best == 'val/acc' else f' by {best}'}, of epoch {expected[-1]}" in text
    assert ("best/val_loss" in outcome.scores) == (best == "val/loss")
    assert ("A star marks the epoch with the lowest val/loss" in text) == (best == "val/loss")


def test_a_resumed_run_knows_the_loss_of_its_best_and_refuses_another_figure(validates_as, capsys):
    validates_as([(0.4, 1.5), (0.4, 1.7), (0.4, 1.6), (0.4, 1.4)])
    fit([*JOB, "--trainer.max_epochs=2"])
    assert best_epoch() == 1
    fit([f"--resume={RUN}", "--trainer.max_epochs=3", "--report.language=zh"])
    assert best_epoch() == 1, "the tie is with a loss of 1.5"
    with untouched(RUN), pytest.raises(UserError, match=r"report\.best=val/loss differs from val/"):
        fit([f"--resume={RUN}", "--trainer.max_epochs=4", "--report.best=val/loss"])
    capsys.readouterr()
    fit([f"--resume={RUN}", "--trainer.max_epochs=4"])
    assert stars(capsys.readouterr().out) == [4]
    assert best_epoch() == 4


def test_macro_f1_is_logged_shown_and_chosen_by(capsys):
    outcome = fit([*JOB, "--report.best=val/macro_f1", "--trainer.max_epochs=3", "--model.lr=0.01"])
    text = capsys.readouterr().out
    assert "val F1" in text
    header, *rows = Path(RUN, "metrics.csv").read_text().splitlines()
    column = header.split(",").index("val/macro_f1")
    values = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert len(values) == 3
    assert best_epoch() == 1 + values.index(max(values)) == stars(text)[-1]
    assert outcome.scores["best/val_macro_f1"] == pytest.approx(max(values))
    assert f"val macro F1            {max(values):.2%}" in text
    result = json.loads(Path(RUN, "result.json").read_text())
    assert result["best/val_macro_f1"] == outcome.scores["best/val_macro_f1"]
    data = ShapesDataModule(train_images=80, test_images=20)
    data.setup()
    images, labels = data.images["val"].__getitems__(range(len(data.images["val"])))
    model = TransferClassifier.load_from_checkpoint(BEST_FILE).eval()
    with torch.no_grad():
        expected = MulticlassF1Score(10, average="macro")(model(images), labels)
    assert max(values) == pytest.approx(float(expected), abs=1e-6)


def lenet():
    data = ShapesDataModule(train_images=80, test_images=20)
    return TransferClassifier("lenet5", "none", num_classes=10), data


def test_in_python_the_star_is_that_of_lightnings_callback(validates_as, tmp_path, capsys):
    validates_as([(0.4, 2.0), (0.5, 2.5), (0.3, 1.5)])
    best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="min")
    quiet_trainer(max_epochs=3, callbacks=[Report(figures=False), best]).fit(*lenet())
    assert stars(capsys.readouterr().out) == [1, 3]


def test_in_python_another_figure_is_refused_on_resuming(tmp_path):
    keep = ModelCheckpoint(tmp_path, "last")
    callbacks = [Report(figures=False), keep]
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(*lenet())
    trainer = quiet_trainer(max_epochs=2, callbacks=[Report(best="val/loss")])
    with pytest.raises(UserError, match=r"Report\.best=val/loss differs from val/acc"):
        trainer.fit(*lenet(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("monitor", ["val/macro_f1", "val/loss"])
def test_class_figures_are_logged_where_a_callback_waits_for_one(monitor):
    waits = EarlyStopping(monitor, mode="max", patience=5)
    trainer = quiet_trainer(max_epochs=1, callbacks=[waits])
    trainer.fit(*lenet())
    is_needed = monitor == "val/macro_f1"
    assert ("val/macro_f1" in trainer.callback_metrics) == is_needed
    assert ("val/balanced_accuracy" in trainer.callback_metrics) == is_needed


def test_phases_take_the_best_of_the_run_and_not_that_of_another_callback(tmp_path):
    own = ModelCheckpoint(tmp_path, monitor="val/loss", mode="min")
    of_run = RunCheckpoint(RunFolder(tmp_path, "{}"), BEST, monitor="val/acc")
    plain = ModelCheckpoint(tmp_path)
    assert best_checkpoint_of(SimpleNamespace(checkpoint_callbacks=[plain, own, of_run])) is of_run
    assert best_checkpoint_of(SimpleNamespace(checkpoint_callbacks=[plain, own])) is own
    assert best_checkpoint_of(SimpleNamespace(checkpoint_callbacks=[plain])) is None


def test_no_other_figure_is_taken():
    with pytest.raises(UserError, match="best is val/f1: take val/acc, val/loss, val/macro_f1"):
        Report(best="val/f1")
