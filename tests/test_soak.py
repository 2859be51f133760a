"""Thousands of epochs: memory, open files and disk stay flat."""

import os
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback

from cifar_transfer.commands.fit import fit
from cifar_transfer.training.report import Report

PAGE = os.sysconf("SC_PAGE_SIZE")
JOB = [
    "--model.backbone=lenet5",
    "--model.weights=none",
    "--data=ShapesDataModule",
    "--data.train_images=200",
    "--data.test_images=50",
    "--data.batch_size=60",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--freeze.unfreeze_epoch=2",
]


class Gauge(Callback):
    """What each epoch leaves: bytes of memory, open files, bytes of the run's folder."""

    def __init__(self):
        self.rows = []

    def on_train_epoch_start(self, trainer, module):
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        files = len(os.listdir("/proc/self/fd"))
        disk = sum(
            path.stat().st_size for path in Path(trainer.log_dir).rglob("*") if path.is_file()
        )
        self.rows.append((memory, files, disk))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("epochs", "memory_a_thousand"),
    # The allocator itself takes up to 80 kB an epoch on a busy machine (seen over forty epochs); a
    # batch that is kept takes 700 kB.
    [
        pytest.param(60, 300e6, id="60 epochs"),
        pytest.param(2000, 4e6, id="2000 epochs", marks=pytest.mark.whole),
    ],
)
def test_memory_files_and_disk_are_flat(tmp_path, monkeypatch, capsys, epochs, memory_a_thousand):
    monkeypatch.chdir(tmp_path)
    gauge = Gauge()
    real = Report.on_train_epoch_start
    monkeypatch.setattr(
        Report,
        "on_train_epoch_start",
        lambda self, *args: (gauge.on_train_epoch_start(*args), real(self, *args)),
    )
    fit([*JOB, f"--trainer.max_epochs={epochs}"])
    assert len(gauge.rows) == epochs
    epoch = np.arange(epochs)
    later = epoch >= epochs // 3  # what is allocated once, is by then
    memory, files, disk = (
        np.polyfit(epoch[later], np.array(column)[later], 1)[0]
        for column in zip(*gauge.rows, strict=True)
    )
    with capsys.disabled():
        print(
            f"\nan epoch leaves {memory:.0f} bytes of memory, {files:.4f} files, "
            f"{disk:.0f} bytes of disk"
        )
    assert memory * 1000 < memory_a_thousand
    assert abs(files) < 0.01
    assert disk < 2000, "seven figures of an epoch and three of steps"
    assert (Path("lightning_logs/version_0/figures") / "epochs.png").is_file()
