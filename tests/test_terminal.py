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
from cifar_transfer.results.terminal import Table
from cifar_transfer.training.progress_bar import OneLineProgressBar

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


def left(capsys, freeze, seconds, last, sides=(None,)):
    """What the column of that name has after each epoch."""
    module = SimpleNamespace(
        epoch_scores=dict, learning_rate=0.1, side_at=lambda n, of: sides[len(sides) * n // of]
    )
    table, found = Table(), []
    for epoch, (phase, taken) in enumerate(seconds):
        freeze.phase = phase
        table.add(trainer(max_epochs=last, current_epoch=epoch, callbacks=[freeze]), module, taken)
        found.append(re.search(r"(?: s|:\d\d) *(.*)", capsys.readouterr().out)[1])
    return found


def test_the_time_left_knows_what_comes_and_claims_nothing_that_was_not_seen(capsys):
    freeze = BackboneFreeze()
    freeze.plan = [Phase(["head"]), Phase(["all"], epoch=2, lr=1e-4)]
    epochs = [(0, 10.0), (0, 12.0), (1, 60.0), (1, 66.0)]
    assert left(capsys, freeze, epochs, 5) == ["> 40 s", "> 36 s", "2 min", "66 s"]
    freeze.plan = [Phase(["head"])]
    assert left(capsys, freeze, [(0, 400.0), (0, 400.0)], 40) == ["4.3 h", "4.2 h"]
    freeze.plan = [Phase(["head"]), Phase(["all"], patience=1)]
    assert left(capsys, freeze, [(0, 10.0), (1, 30.0), (1, 30.0)], 3) == ["> 20 s", "30 s", ""]
    freeze.plan = [Phase(["all"])]
    epochs = [(0, 10.0), (0, 10.0), (0, 30.0), (0, 30.0)]
    assert left(capsys, freeze, epochs, 4, (32, 48)) == ["> 30 s", "> 20 s", "30 s", ""], (
        "larger images take longer"
    )
