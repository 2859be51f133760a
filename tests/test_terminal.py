"""What a run looks like on a terminal, and in a pipe."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import time
from types import SimpleNamespace

import pytest
from conftest import FORKS, RUN, TINY, run_fit, run_module
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from cifar_transfer import BackboneFreeze, Phase
from cifar_transfer.base.console import say
from cifar_transfer.results.terminal import EpochRow, EpochTable
from cifar_transfer.training.progress_bar import OneLineProgressBar
from cifar_transfer.training.report import Report
from cifar_transfer.training.run_clock import RunClock

HEADING = "epoch  train loss  train acc  val loss  val acc         lr    time      left"
BAR = re.compile(r"[█▏▎▍▌▋▊▉]")


def drawn(written):
    """All that was drawn, piece by piece, and the lines that stay."""
    pieces, lines = [], []
    for line in re.sub(r"\x1b\[\d*m", "", written).replace("\r\n", "\n").split("\n"):
        shown = ""
        for piece in line.split("\r"):
            shown = piece + shown[len(piece) :]
            pieces.append(piece)
        lines.append(shown.rstrip())
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", "".join(pieces)), (
        "nothing moves the cursor to other lines"
    )
    return pieces, lines


def on_terminal(folder, columns, *options, command=None, expect=0):
    """What `fit` or another command writes to a terminal of so many columns."""
    module = "cifar_transfer" if command else "cifar_transfer.fit"
    options = (command, *options) if command else options
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    (folder / "out").symlink_to(os.ttyname(slave))
    (folder / "err").touch()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")
    }
    environment |= {"RUN_FIT": f"{folder}{os.sep}", "TERM": "xterm"}
    process = FORKS.Process(target=run_module, args=(folder, module, options, environment))
    process.start()
    written = b""
    while (alive := process.is_alive()) or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.2 * alive)[0]:
            written += os.read(master, 65536)
    os.close(slave)
    os.close(master)
    assert process.exitcode == expect, (folder / "err").read_text()
    return written.decode()


@pytest.mark.slow
def test_a_run_at_80_columns_and_its_continuation_in_a_pipe(tmp_path):
    more = ["--data.batch_size=8", "--trainer.max_epochs=4", "--freeze.unfreeze_epoch=2"]
    written = on_terminal(tmp_path, 80, *TINY, *more)
    pieces, lines = drawn(written)
    assert max(map(len, pieces)) < 80, "no line wraps"
    form = r"epoch 4/4 [█▏▎▍▌▋▊▉ ]{20,40} \d+%  loss \d\.\d{3}  \d+ images/s  \d\d:\d\d left *"
    assert any(re.fullmatch(form, piece) for piece in pieces), [
        piece for piece in pieces if "4/4" in piece
    ]
    assert any(piece.startswith("test ") for piece in pieces)
    assert not any("?" in piece for piece in pieces), "nothing is said of what is not known yet"
    table = lines[lines.index(HEADING) + 1 :][:6]
    assert table[0] == "Epochs 1 to 2: backbone frozen, 10,250 parameters train."
    assert table[3] == "Epochs 3 to 4: everything at rate 0.0001, 352,042 parameters train."
    epochs = [row for row in table if not row.startswith("Epoch")]
    assert [row.split()[0] for row in epochs] == ["1/4", "2/4", "3/4", "4/4"], (
        "and no bar is left between them"
    )
    assert ["> " in row for row in epochs] == [True, True, False, False], (
        "how long others take is not known before"
    )
    best = 0.0
    for row in epochs:
        accuracy = float(re.findall(r"([\d.]+)%", row)[1])
        assert (" *" in row) == (accuracy > best), table
        best = max(best, accuracy)
    assert not [line for line in lines if BAR.search(line)], "it leaves nothing behind"
    assert "\x1b[32m" in written
    assert f"run            {RUN}" in lines
    done = run_fit(tmp_path, "--resume", RUN, "--trainer.max_epochs=5")
    continued = done.stdout.splitlines()
    at = continued.index(HEADING)
    assert continued[at - 1] == f"The best validation accuracy so far: {best:.2f}%."
    assert continued[at + 1] == "Epoch 5: everything at rate 0.0001, 352,042 parameters train."
    accuracy = float(re.findall(r"([\d.]+)%", continued[at + 2])[1])
    assert (" *" in continued[at + 2]) == (accuracy > best)
    assert continued.count(HEADING) == 1
    assert not re.search(r"[^\S\n ]|[^\x20-\x7e\n]", done.stdout), (
        "plain lines, without control characters"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def trainer(**others):
    state = SimpleNamespace(fn="fit", stage=RunningStage.TRAINING)
    usual = {"sanity_checking": False, "world_size": 8, "state": state}
    usual |= {"max_epochs": 40, "max_steps": -1, "current_epoch": 39}
    usual |= {
        "num_training_batches": 10**6,
        "is_global_zero": True,
        "callbacks": [],
        "checkpoint_callbacks": [],
    }
    return SimpleNamespace(**usual | {"progress_bar_metrics": {"train/loss": 2.345}} | others)


@pytest.mark.parametrize("columns", [20, 40, 80, 160])
@pytest.mark.parametrize("plain", [True, False])
def test_the_bar_never_wraps_and_lines_do_not_tear_it(monkeypatch, columns, plain):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1") if plain else monkeypatch.delenv("NO_COLOR", raising=False)
    bar, owner = OneLineProgressBar(), trainer()
    bar.setup(owner, nn.Module(), "fit")
    for number in range(2):
        bar.on_train_batch_start(owner, nn.Module(), (None, range(1024)), number)
        time.sleep(0.11)
    say(owner, "said amid an epoch")
    bar.on_train_batch_start(owner, nn.Module(), (None, range(1024)), 2)
    bar.on_train_epoch_end(owner, nn.Module())
    pieces, lines = drawn(terminal.getvalue())
    assert max(map(len, pieces)) < min(columns, 80)
    assert [line for line in lines if line] == ["said amid an epoch"]
    assert ("\x1b" in terminal.getvalue()) != plain
    shown = "".join(pieces)
    assert columns < 40 or ("loss 2.345" in shown and re.search(r"\d{4,6} images", shown))


def row(**others):
    """Return a line of a table whose scores are not those of `others`."""
    values = {"epoch": 40, "is_best": False, "learning_rate": 1e-4, "seconds": 12.34}
    scores = {"train_loss": 2.3, "train_accuracy": 0.1, "val_loss": 2.4, "val_accuracy": 0.2}
    return EpochRow(**values | scores | {"time_left": "> 12 min"} | others)


def test_a_table_of_999_epochs_fits_into_80_columns():
    table = EpochTable(999)
    lines = [table.heading(), table.line(row(epoch=999)), table.line(row(is_best=True))]
    lines.append(table.line(row(seconds=6000, learning_rate=1.23456e-5)))
    assert lines == [
        "  epoch  train loss  train acc  val loss  val acc         lr    time      left",
        "999/999       2.300     10.00%     2.400   20.00%     0.0001  12.3 s  > 12 min",
        " 40/999       2.300     10.00%     2.400   20.00% *   0.0001  12.3 s  > 12 min",
        " 40/999       2.300     10.00%     2.400   20.00%    1.2e-05  100:00  > 12 min",
    ]
    assert max(map(len, lines)) < 80


def test_what_is_not_known_is_left_out():
    unknown = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy"))
    line = EpochTable(None).line(row(**unknown, time_left=""))
    assert line.split() == ["40", "0.0001", "12.3", "s"]
    assert EpochTable(-1).line(row()).startswith("   40  ")


def left(freeze, epochs, max_epochs, sides=(None,)):
    """Return what `Report` has in its column of that name after each epoch.

    Args:
        freeze: The `BackboneFreeze` of the run.
        epochs: Phase and seconds of each epoch.
        max_epochs: Epochs of the run.
        sides: Sides of the images, each for an equal part of the run.
    """
    module = SimpleNamespace(side_at=lambda done, total: sides[len(sides) * done // total])
    report = Report()
    texts = []
    for epoch, (phase, seconds) in enumerate(epochs):
        freeze.phase = phase
        report.clock = SimpleNamespace(epoch_seconds=seconds)
        owner = trainer(max_epochs=max_epochs, current_epoch=epoch, callbacks=[freeze])
        texts.append(report._time_left(owner, module))
    return texts


def test_the_time_left_knows_what_comes_and_claims_nothing_that_was_not_seen():
    freeze = BackboneFreeze()
    freeze.plan = [Phase(["head"]), Phase(["all"], epoch=2, lr=1e-4)]
    epochs = [(0, 10.0), (0, 12.0), (1, 60.0), (1, 66.0)]
    assert left(freeze, epochs, 5) == ["> 40 s", "> 36 s", "2 min", "66 s"]
    freeze.plan = [Phase(["head"])]
    assert left(freeze, [(0, 400.0), (0, 400.0)], 40) == ["4.3 h", "4.2 h"]
    freeze.plan = [Phase(["head"]), Phase(["all"], patience=1)]
    assert left(freeze, [(0, 10.0), (1, 30.0), (1, 30.0)], 3) == ["> 20 s", "30 s", ""]
    freeze.plan = [Phase(["all"])]
    epochs = [(0, 10.0), (0, 10.0), (0, 30.0), (0, 30.0)]
    assert left(freeze, epochs, 4, (32, 48)) == ["> 30 s", "> 20 s", "30 s", ""], (
        "larger images take longer"
    )


@pytest.mark.parametrize("limits", [{"max_epochs": -1}, {"max_epochs": None}, {"max_steps": 100}])
def test_a_run_that_does_not_end_with_an_epoch_has_no_time_left(limits):
    assert Report()._time_left(trainer(**limits), SimpleNamespace()) == ""


def test_the_clock_counts_a_validation_as_time_but_not_as_training(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = RunClock()
    clock.start_epoch()
    clock.count_images(60)
    now += 4
    clock.end_training()
    now += 2
    clock.end_validation()
    clock.end_epoch()
    now += 50  # between two epochs
    assert (clock.seconds, clock.epoch_seconds, clock.images_per_second) == (6, 6, 15)
    clock.start_epoch()
    clock.count_images(30)
    now += 3
    resumed = RunClock()
    resumed.load_state_dict(clock.state_dict())
    resumed.start()
    resumed.count_images(30)
    now += 2
    resumed.end_epoch()
    assert (resumed.seconds, resumed.epoch_seconds, resumed.images_per_second) == (11, 5, 12)
