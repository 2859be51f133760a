"""What a run looks like on a terminal, and in a pipe."""

import fcntl
import io
import logging
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
from conftest import FORKS, RUN, TINY, quiet_trainer, run_fit, run_module
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from cifar_transfer import BackboneFreeze, Phase, ShapesDataModule, TransferClassifier
from cifar_transfer.base.console import _is_worth_printing, duration, hush, say, styled
from cifar_transfer.base.errors import UserError, one_sentence
from cifar_transfer.base.text import wrapped
from cifar_transfer.cli.fit_cli import FitCLI
from cifar_transfer.data import images
from cifar_transfer.results.epoch_table import EpochRow, EpochTable
from cifar_transfer.training import progress_bar
from cifar_transfer.training.progress_bar import OneLineProgressBar
from cifar_transfer.training.report import Report
from cifar_transfer.training.run_clock import RunClock

HEADING = "epoch  train loss  train acc  val loss  val acc         lr    time      left"
BAR = re.compile(r"[█▏▎▍▌▋▊▉]")


def drawn(written):
    """Return every piece of text that was drawn, and the lines that stay."""
    without_styles = re.sub(r"\x1b\[\d*m", "", written).replace("\r\n", "\n")
    pieces = []
    lines = []
    for line in without_styles.split("\n"):
        shown = ""
        for piece in line.split("\r"):
            shown = piece + shown[len(piece) :]
            pieces.append(piece)
        lines.append(shown.rstrip())
    moves = re.search(r"[\x00-\x08\x0b-\x1f]", "".join(pieces))
    assert not moves, "the cursor stays in its line"
    return pieces, lines


def on_terminal(folder, columns, *options):
    """Return what `fit` writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    (folder / "out").symlink_to(os.ttyname(slave))
    (folder / "err").touch()
    environment = dict(os.environ)
    environment.pop("COLUMNS", None)
    environment.pop("NO_COLOR", None)
    environment |= {"RUN_FIT": f"{folder}{os.sep}", "TERM": "xterm"}
    args = (folder, "cifar_transfer.fit", options, environment)
    process = FORKS.Process(target=run_module, args=args)
    process.start()
    written = b""
    while process.is_alive() or has_text(master, 0):
        if has_text(master, 0.2):
            written += os.read(master, 65536)
    os.close(slave)
    os.close(master)
    assert process.exitcode == 0, (folder / "err").read_text()
    return written.decode()


def has_text(descriptor, seconds):
    readable, _, _ = select.select([descriptor], [], [], seconds)
    return bool(readable)


@pytest.mark.slow
def test_a_run_at_80_columns_and_its_continuation_in_a_pipe(tmp_path):
    more = ["--data.batch_size=8", "--trainer.max_epochs=4", "--freeze.unfreeze_epoch=2"]
    written = on_terminal(tmp_path, 80, *TINY, *more)
    pieces, lines = drawn(written)
    assert max(map(len, pieces)) < 80, "no line wraps"
    said = (tmp_path / "err").read_text()
    for nothing in ("Seed set to", "GPU available: False", "`Trainer.fit` stopped"):
        assert nothing not in written + said
    form = r"epoch 4/4 [█▏▎▍▌▋▊▉ ]{20,40} \d+%  loss \d\.\d{3}  \d+ images/s  \d\d:\d\d left *"
    last_epoch = [piece for piece in pieces if "4/4" in piece]
    assert any(re.fullmatch(form, piece) for piece in last_epoch), last_epoch
    assert any(piece.startswith("test ") for piece in pieces)
    assert not any("?" in piece for piece in pieces), "nothing is said of what is not known yet"
    assert not any(BAR.search(line) for line in lines), "the bar leaves nothing behind"
    assert "\x1b[32m" in written
    assert f"run            {RUN}" in lines
    start = lines.index(HEADING) + 1
    table = lines[start : start + 6]
    assert table[0] == "Epochs 1 to 2: backbone frozen, 10,250 parameters train."
    assert table[3] == "Epochs 3 to 4: everything at rate 0.0001, 352,042 parameters train."
    rows = [line for line in table if not line.startswith("Epoch")]
    assert [row.split()[0] for row in rows] == ["1/4", "2/4", "3/4", "4/4"]
    # How long unfrozen epochs take is not known before.
    assert ["> " in row for row in rows] == [True, True, False, False]
    best = 0.0
    for row in rows:
        accuracy = val_accuracy(row)
        assert (" *" in row) == (accuracy > best), table
        best = max(best, accuracy)
    done = run_fit(tmp_path, "--resume", RUN, "--trainer.max_epochs=5")
    continued = done.stdout.splitlines()
    start = continued.index(HEADING)
    assert continued.count(HEADING) == 1
    assert continued[start - 1] == f"The best validation accuracy so far: {best:.2f}%."
    assert continued[start + 1] == "Epoch 5: everything at rate 0.0001, 352,042 parameters train."
    row = continued[start + 2]
    assert (" *" in row) == (val_accuracy(row) > best)
    assert not re.search(r"[^\S\n ]|[^\x20-\x7e\n]", done.stdout), "no control characters"


def val_accuracy(row):
    """Return the validation accuracy in a line of the table, in per cent."""
    return float(re.findall(r"([\d.]+)%", row)[1])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def take_terminal(monkeypatch, columns=80):
    """Return a terminal that is standard output for the rest of a test."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminal


def trainer(**others):
    """Return what a bar and a table ask of a Trainer in the last of 40 epochs."""
    values = {
        "sanity_checking": False,
        "world_size": 8,
        "state": SimpleNamespace(fn="fit", stage=RunningStage.TRAINING),
        "max_epochs": 40,
        "max_steps": -1,
        "current_epoch": 39,
        "num_training_batches": 10**6,
        "is_global_zero": True,
        "callbacks": [],
        "checkpoint_callbacks": [],
        "progress_bar_metrics": {"train/loss": 2.345},
    }
    return SimpleNamespace(**values | others)


def draw_bar(owner):
    """Draw a bar for three batches with a line in between."""
    bar = OneLineProgressBar()
    module = nn.Module()
    batch = (None, range(1024))
    bar.setup(owner, module, "fit")
    for index in range(2):
        bar.on_train_batch_start(owner, module, batch, index)
        time.sleep(0.11)  # a bar is drawn ten times a second
    say(owner, "amid an epoch")
    bar.on_train_batch_start(owner, module, batch, 2)
    bar.on_train_epoch_end(owner, module)


@pytest.mark.parametrize("columns", [20, 40, 80, 160])
def test_the_bar_never_wraps_and_lines_do_not_tear_it(monkeypatch, columns):
    terminal = take_terminal(monkeypatch, columns)
    draw_bar(trainer())
    pieces, lines = drawn(terminal.getvalue())
    assert max(map(len, pieces)) < min(columns, 80)
    assert [line for line in lines if line] == ["amid an epoch"]
    text = "".join(pieces)
    if columns >= 40:
        assert "loss 2.345" in text
        assert re.search(r"\d{4,6} images", text)


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_left_out_where_they_are_not_welcome(monkeypatch, variable, value):
    terminal = take_terminal(monkeypatch)
    draw_bar(trainer())
    assert "\x1b[32m" in terminal.getvalue()
    assert styled("x", 36) == "\x1b[36mx\x1b[0m"
    terminal = take_terminal(monkeypatch)
    monkeypatch.setenv(variable, value)
    draw_bar(trainer())
    assert "\x1b" not in terminal.getvalue()
    assert styled("x", 36) == "x"


def test_a_disabled_bar_draws_nothing(monkeypatch):
    terminal = take_terminal(monkeypatch)
    bar = OneLineProgressBar()
    bar.disable()
    bar.on_train_batch_start(trainer(), nn.Module(), (None, range(8)), 0)
    assert terminal.getvalue() == ""
    bar.enable()
    bar.on_train_batch_start(trainer(), nn.Module(), (None, range(8)), 0)
    assert "epoch 40/40" in terminal.getvalue()
    bar.on_train_epoch_end(trainer(), nn.Module())


def test_a_validation_has_a_bar_of_its_own(monkeypatch):
    """The images and the time of the training before it say nothing of how long it takes."""
    take_terminal(monkeypatch)
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_DRAWINGS", 0)
    data = ShapesDataModule(train_images=100, test_images=10, batch_size=10, eval_batch_size=4)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    bar = OneLineProgressBar()
    totals = {}
    draw = bar._draw

    def draw_and_note(trainer, stage, batches):
        draw(trainer, stage, batches)
        totals.setdefault(stage, set()).add((bar._bar.total, bar._bar.initial))

    monkeypatch.setattr(bar, "_draw", draw_and_note)
    fitter = quiet_trainer(max_epochs=2, enable_progress_bar=True, callbacks=[bar])
    fitter.fit(model, data)
    (val_batches,) = fitter.num_val_batches
    assert totals["val"] == {(val_batches, 0)}
    assert totals["train"] == {(fitter.num_training_batches, 0)}
    assert val_batches != fitter.num_training_batches


def test_warnings_of_this_package_are_printed_without_their_place(monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    monkeypatch.setattr("threading.excepthook", threading.excepthook)
    with warnings.catch_warnings():
        hush()
        ours = warnings.formatwarning("a fault", UserWarning, images.__file__, 1)
        theirs = warnings.formatwarning("a fault", UserWarning, pytest.__file__, 1)
    assert ours == "warning: a fault\n"
    assert theirs != "warning: a fault\n"


SENTENCE = "The name of a folder is /tmp/a-long/path-without/any-space: give another name."


def test_lines_are_broken_between_words_on_a_terminal_and_nowhere_else(monkeypatch):
    terminal = take_terminal(monkeypatch, 40)
    broken = "The name of a folder is\n/tmp/a-long/path-without/any-space:\ngive another name."
    assert wrapped(SENTENCE, terminal) == broken
    assert wrapped(SENTENCE, io.StringIO()) == SENTENCE
    assert wrapped(SENTENCE, None) == SENTENCE
    assert wrapped("a  table   of\n\ntwo  rows", terminal) == "a  table   of\n\ntwo  rows"
    coloured = f"{'x' * 20} \x1b[32m{'y' * 18}\x1b[0m"
    assert wrapped(coloured, terminal) == coloured, "styles take no place"
    say(trainer(), SENTENCE)
    assert terminal.getvalue().splitlines() == broken.splitlines()


def test_warnings_log_lines_and_errors_are_broken_between_words_too(monkeypatch):
    monkeypatch.setattr("sys.stderr", take_terminal(monkeypatch, 40))
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings():
        hush()
        warning = warnings.formatwarning(SENTENCE, UserWarning, images.__file__, 1)
    record = logging.LogRecord("lightning", logging.INFO, "", 1, "%s", (SENTENCE,), None)
    assert _is_worth_printing(record)
    with pytest.raises(SystemExit, match=r"^2$"), one_sentence():
        raise UserError(SENTENCE)
    written = [warning, record.getMessage(), sys.stderr.getvalue()]
    for text in written:
        assert max(map(len, text.splitlines())) < 40
        assert " ".join(text.split()).removeprefix("warning: ").removeprefix("error: ") == SENTENCE


@pytest.mark.parametrize(
    ("line", "is_printed"),
    [
        ("Seed set to 0", False),
        ("[rank: 1] Seed set to 0", False),
        ("GPU available: False, used: False", False),
        ("GPU available: True (cuda), used: False", True),
        ("`Trainer.fit` stopped: `max_epochs=2` reached.", False),
        ("`Trainer.fit` stopped: `max_steps=20` reached.", True),
        ("Time limit reached. Elapsed time is 0:00:01. Signaling Trainer to stop.", True),
    ],
)
def test_lines_that_say_nothing_are_left_out(line, is_printed):
    record = logging.LogRecord("lightning", logging.INFO, "", 1, line, (), None)
    assert _is_worth_printing(record) == is_printed


class ZMQInteractiveShell:
    """What a notebook has by this name."""


@pytest.fixture(params=[False, True], ids=["terminal", "notebook"])
def shows_notebook(request, monkeypatch):
    """Whether Python runs in a notebook, which has no ipywidgets."""
    shell = ZMQInteractiveShell() if request.param else None
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress_bar, "find_spec", lambda name: None)
    return request.param


def test_a_notebook_that_cannot_show_lightnings_bar_gets_ours(shows_notebook):
    pytest.importorskip("rich", reason="Lightning's bar needs rich")
    data = ShapesDataModule(train_images=40, test_images=10, batch_size=20)
    model = TransferClassifier("lenet5", "none", class_names=data.class_names)
    fitter = quiet_trainer(max_epochs=1, enable_progress_bar=True, callbacks=[RichProgressBar()])
    fitter.fit(model, data)
    bars = [bar for bar in fitter.callbacks if isinstance(bar, OneLineProgressBar)]
    assert len(bars) == int(shows_notebook)
    assert fitter.progress_bar_callback.is_disabled == shows_notebook
    fitter.fit(model, data)
    assert len([bar for bar in fitter.callbacks if isinstance(bar, OneLineProgressBar)]) == len(
        bars
    )


def test_a_run_in_a_notebook_has_a_bar(tmp_path, monkeypatch, shows_notebook):
    monkeypatch.chdir(tmp_path)
    cli = FitCLI(["--model.backbone=lenet5", "--model.weights=none", "--data=ShapesDataModule"])
    bars = [bar for bar in cli.trainer.callbacks if isinstance(bar, OneLineProgressBar)]
    assert len(bars) == int(shows_notebook)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_durations_are_in_the_unit_that_people_use(seconds, text):
    assert duration(seconds) == text


def row(**others):
    """Return a line of a table whose scores are not those of `others`."""
    values = {"epoch": 40, "is_best": False, "learning_rate": 1e-4, "seconds": 12.34}
    values["val_macro_f1"] = 0.15
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
    table = EpochTable(999, shows_macro_f1=True)
    assert table.heading() == lines[0].replace("val acc", " val F1")
    assert table.line(row(epoch=999)) == lines[1].replace("20.00%", "15.00%")


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
    # Larger images take longer.
    assert left(freeze, epochs, 4, (32, 48)) == ["> 30 s", "> 20 s", "30 s", ""]


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
