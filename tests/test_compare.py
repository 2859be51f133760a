"""Comparing backbones, and the table of them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import TINY, run_fit
from PIL import Image

from cifar_transfer.base import status_line
from cifar_transfer.base.errors import UserError
from cifar_transfer.base.status_line import StatusLine
from cifar_transfer.cli.fit_process import last_line
from cifar_transfer.cli.recipes import check_recipe
from cifar_transfer.commands import compare
from cifar_transfer.network.contestant import parse_contestant, parse_contestants
from cifar_transfer.results import comparison
from cifar_transfer.results.intervals import interval_cells, mean_interval, seeds_note

OPTIONS = [*TINY[2:], "--trainer.max_epochs=2"]
LENET = "lenet5=none"
SHUFFLENET = "shufflenet_v2_x0_5=none"
INCEPTION = "inception_v3=none"  # takes no images of 32 pixels


def csv_rows(folder):
    with (folder / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def failing_fits(monkeypatch):
    """Let every `fit` fail with status 3, and return the list to which its command is added."""
    commands = []

    def start(command, **_):
        commands.append(command)
        return Mock(wait=lambda timeout=None: 3)

    monkeypatch.setattr(subprocess, "Popen", start)
    return commands


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of three backbones, one of which failed: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    backbones = [LENET, INCEPTION, SHUFFLENET]
    process = run_fit(folder, *backbones, *OPTIONS, command="compare", expect=1)
    return folder / "lightning_logs" / "comparison", process


@pytest.mark.slow
def test_a_failure_stops_no_other_backbone(compared):
    out, process = compared
    lenet, inception, shufflenet = csv_rows(out)
    assert lenet["network"] == "lenet5, from scratch"
    assert inception["network"] == "inception_v3, from scratch: failed with exit status 2"
    assert inception["images/s"] == ""
    assert "75 or more" in process.stderr, "the reason is printed"
    assert lenet["parameters (M)"] == "0.06"
    assert shufflenet["parameters (M)"] == "0.35"
    for row in (lenet, shufflenet):
        assert 0 <= float(row["test accuracy (%)"]) <= 100
        assert float(row["images/s"]) > 1


@pytest.mark.slow
def test_the_terminal_has_a_line_for_each_backbone(compared):
    out, process = compared
    assert "--- " not in process.stdout, "what the runs print is in their logs"
    log = (out / "lenet5-from-scratch" / "seed_0" / "fit.log").read_text()
    assert log.count("  2/2  ") == 1
    heading, lenet, inception, shufflenet = process.stdout.splitlines()[2:6]
    assert heading.split() == ["network", "seed", "val", "%", "test", "%", "minutes"]
    assert inception.endswith("  failed with exit status 2")
    rows = csv_rows(out)
    for line, row in ((lenet, rows[0]), (shufflenet, rows[2])):
        assert line.startswith(row["network"])
        columns = ("validation accuracy (%)", "test accuracy (%)", "training time (min)")
        assert line.split()[3:] == ["0", *(row[column] for column in columns)]
        assert len(line) == len(heading) < 80


@pytest.mark.slow
def test_the_table_lines_up_and_the_figure_is_drawn(compared):
    out, _ = compared
    table = (out / "comparison.md").read_text()
    assert len({len(line) for line in table.splitlines()}) == 1
    with Image.open(out / "comparison.png") as figure:
        assert figure.size[0] > 800
        assert len(figure.convert("RGB").getcolors(2**24)) > 50, "something is drawn"


@pytest.mark.slow
def test_only_what_failed_is_tried_again(compared, monkeypatch):
    out, _ = compared
    before = csv_rows(out)
    commands = failing_fits(monkeypatch)
    backbones = parse_contestants([LENET, INCEPTION, SHUFFLENET])
    lenet, inception, shufflenet = compare.compare(backbones, 1, OPTIONS, out)
    assert len(commands) == 1
    assert "--model.backbone=inception_v3" in commands[0]
    assert "--resume" not in commands[0], "a refused start has left no run"
    assert inception.failures == ["failed with exit status 3"]
    for network, row in ((lenet, before[0]), (shufflenet, before[2])):
        (run,) = network.runs
        assert run.images_per_second == pytest.approx(float(row["images/s"]), abs=0.5)
    with pytest.raises(UserError, match="another recipe"):
        compare.compare(backbones, 1, [*OPTIONS, "--model.lr=0.5"], out)


@pytest.mark.slow
def test_more_seeds_add_runs(compared, tmp_path, monkeypatch):
    """All networks have their run with one seed before the first one has that with the next."""
    out = shutil.copytree(compared[0], tmp_path / "comparison")
    commands = failing_fits(monkeypatch)
    lenet, shufflenet = compare.compare(parse_contestants([LENET, SHUFFLENET]), 3, OPTIONS, out)
    seeds = [command[-2] for command in commands]
    assert seeds == [f"--seed_everything={seed}" for seed in (1, 1, 2, 2)]
    names = ["lenet5", "shufflenet_v2_x0_5"] * 2
    for command, name in zip(commands, names, strict=True):
        assert f"--model.backbone={name}" in command
    assert lenet.failures == [f"seed {seed} failed with exit status 3" for seed in (1, 2)]
    assert len(lenet.finished_runs) == len(shufflenet.finished_runs) == 1
    with (out / "comparison-runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1", "2"] * 2
    assert [bool(row["failure"]) for row in rows] == [False, True, True] * 2


@pytest.mark.whole
def test_a_comparison_that_was_killed_continues(tmp_path):
    options = [SHUFFLENET, *OPTIONS[:-1], "--trainer.max_epochs=20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_transfer", "compare", *options],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    out = tmp_path / "lightning_logs" / "comparison"
    folder = out / "shufflenet_v2_x0_5-from-scratch" / "seed_0"
    runs = folder / "lightning_logs"
    deadline = time.monotonic() + 200
    while not (runs / "version_0" / "checkpoints" / "last.ckpt").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    continued = run_fit(tmp_path, *options, command="compare")
    assert "minutes" in continued.stdout
    log = (folder / "fit.log").read_text()
    assert log.count(" 1/20  ") == 1
    assert log.count("20/20  ") == 1
    assert [path.name for path in runs.iterdir()] == ["version_0"], "continued, not begun again"
    result = json.loads((runs / "version_0" / "result.json").read_text())
    assert result["epochs"] == 20
    assert f"{result['images_per_second']:.0f}" == csv_rows(out)[0]["images/s"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["resnet81"], "did you mean resnet18"),
        (["resnet18=gone.pth"], "neither a file nor a name of resnet18's weights"),
        ([LENET, LENET], "name each once"),
        ([LENET, "--config", "gone.yaml"], "gone.yaml is neither a file nor a recipe"),
        ([LENET, "--out=file/runs"], "--out file/runs cannot be made a folder"),
        ([LENET, "--seeds=0"], "--seeds is 0: take 1 to 1000"),
        ([LENET, "--seed_everything=1"], "compare sets the seeds itself"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message) as error:
        compare.main(options)
    assert "\n" not in str(error.value)


def test_two_files_of_weights_with_one_name_are_told_apart(tmp_path, monkeypatch):
    backbones = []
    for folder in ("a", "b"):
        checkpoint = Path("lightning_logs/version_0/checkpoints/best.ckpt")
        path = tmp_path / folder / checkpoint
        path.parent.mkdir(parents=True)
        path.touch()
        backbones.append(parse_contestant(f"lenet5={path}"))
    first, second = backbones
    assert first.folder == second.folder == "lenet5-version_0-best"
    failing_fits(monkeypatch)
    networks = compare.compare([first], 1, [], tmp_path / "out")
    assert networks[0].failures
    message = r"lenet5-version_0-best holds results of another recipe .*: name another folder"
    with pytest.raises(UserError, match=message):
        compare.compare([second], 1, [], tmp_path / "out")


def test_all_recipes_are_handed_on(tmp_path, monkeypatch):
    handed_on = []

    def record(backbones, num_seeds, fit_options, out):
        handed_on.extend(fit_options)
        return []

    monkeypatch.setattr(compare, "compare", record)
    recipes = ["--config", "fast", "--config=scratch"]
    compare.main([LENET, *recipes, "--out", str(tmp_path), "--model.lr=1e-3"])
    fast, scratch, lr = handed_on
    assert fast.startswith("--config=")
    assert fast.endswith("fast.yaml")
    assert scratch.endswith("scratch.yaml")
    assert lr == "--model.lr=1e-3"


@pytest.mark.parametrize("content", ["no json", "{}"])
def test_a_recipe_file_of_somebody_else_is_another_recipe(tmp_path, content):
    options = ["--config={trainer: {max_epochs: 2}}"]
    assert check_recipe(tmp_path, options) == {"options": options, "config": []}
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UserError, match="holds results of another recipe"):
        check_recipe(tmp_path, [])


def network(label, *results, **result):
    """A network with a run for each of the results, or with the one that the keywords give."""
    backbone, _, weights = label.partition(", ")
    runs = []
    for seed, each in enumerate(results or [result]):
        runs.append(comparison.ComparedRun(seed, each))
    return comparison.ComparedNetwork(backbone, label, weights == "from scratch", runs)


def with_accuracies(label, *accuracies):
    """A network with a run for each accuracy on the test images, a share of 1."""
    shared = {"parameters": 2e6, "seconds": 120, "images_per_second": 50}
    return network(label, *({**shared, "best/test_acc": accuracy} for accuracy in accuracies))


def test_a_value_that_a_result_does_not_have_is_an_empty_cell():
    lenet = network("lenet5, from scratch", parameters=61_706, seconds=90, images_per_second=9.6)
    _, row = comparison.summary_table([lenet])
    assert row == ["lenet5, from scratch", "0.06", "", "", "1.5", "10"]


def test_the_figure_shows_accuracy_against_parameters_time_and_speed():
    values = {"parameters": 2e6, "seconds": 120, "images_per_second": 50, "best/val_acc": 0.5}
    tested = network("resnet18, pretrained", **values, **{"best/test_acc": 0.4})
    untested = network("resnet18, from scratch", **values)
    figure = comparison.draw_comparison([tested, untested])
    assert figure.axes[0].get_ylabel() == "validation accuracy (%)", "not all have a test accuracy"
    for axes, x in zip(figure.axes, (2, 2, 50), strict=True):
        for line in axes.lines:
            assert line.get_xydata().tolist() == [[x, 50]]
    pretrained, scratch = figure.axes[0].lines
    assert scratch.get_markerfacecolor() == "white"
    assert pretrained.get_markerfacecolor() == pretrained.get_color() == scratch.get_color()
    figure = comparison.draw_comparison([tested])
    assert figure.axes[0].get_ylabel() == "test accuracy (%)"
    assert figure.axes[0].lines[0].get_ydata() == [40]


def test_the_figure_shows_every_run_and_the_interval():
    figure = comparison.draw_comparison([with_accuracies("resnet18", 0.90, 0.91, 0.92)])
    axes = figure.axes[0]
    mean, *runs = [line for line in axes.lines if line.get_marker() == "o"]
    assert mean.get_ydata() == pytest.approx([91])
    assert [run.get_ydata()[0] for run in runs] == pytest.approx([90, 91, 92])
    ((_, low), (_, high)) = axes.collections[0].get_segments()[0]
    assert (low, high) == pytest.approx((91 - 2.484, 91 + 2.484), abs=1e-3)


@pytest.mark.parametrize(
    ("values", "deviation", "half_width"),
    [
        ([90, 91, 92], 1.0, 2.4842),  # 4.303 / sqrt(3)
        ([2, 4, 4, 4, 5, 5, 7, 9], 2.13809, 1.78775),  # 2.365 * 2.13809 / sqrt(8)
        ([0, 2] * 50, 1.0050378, 0.205229),  # 2.042, that of 30 degrees, for 99
    ],
)
def test_the_interval_is_that_of_student(values, deviation, half_width):
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(sum(values) / len(values))
    assert interval.deviation == pytest.approx(deviation, rel=1e-4)
    assert interval.half_width == pytest.approx(half_width, rel=1e-3)


def test_one_or_two_values_have_no_interval():
    assert mean_interval([3.0]) == (3.0, None, None)
    assert mean_interval([3.0]).text(2) == "3.00"
    assert mean_interval([1, 3]) == (2.0, pytest.approx(2**0.5), None)
    assert mean_interval([1, 3]).text(2) == "2.00"
    assert interval_cells(mean_interval([1, 3])) == ["2.00", "1.41", "", ""]
    too_few = "Mean over 2 seeds, too few for an interval: take 3 or more."
    assert seeds_note(2, num_networks=1) == f"{too_few}\n"
    assert seeds_note(2, num_networks=2).startswith(f"{too_few} Differences are")


def test_an_interval_ends_where_percentages_do():
    """A deviation of 50 makes half of the interval 124."""
    interval = mean_interval([0, 50, 100])
    assert interval_cells(interval) == ["50.00", "50.00", "0.00", "100.00"]
    assert interval_cells(interval, lowest=-100) == ["50.00", "50.00", "-74.22", "100.00"]


def test_a_difference_is_taken_seed_by_seed():
    """Each seed gains a point, which the two means alone would not show."""
    first = with_accuracies("resnet18", 0.80, 0.90, 0.70)
    second = with_accuracies("resnet50", 0.81, 0.91, 0.71)
    gained = comparison.difference(second, first, "test")
    assert gained.mean == pytest.approx(1)
    assert gained.half_width == pytest.approx(0, abs=1e-6)
    heading, first_row, second_row = comparison.summary_table([first, second])
    column = heading.index("difference (points)")
    assert first_row[column] == ""
    assert second_row[column] == "1.00 ± 0.00"
    assert second_row[2] == "81.00 ± 24.84"
    second = replace(second, runs=[*second.runs[:2], comparison.ComparedRun(2, failure="failed")])
    assert comparison.difference(second, first, "test").mean == pytest.approx(1)
    assert comparison.difference(second, first, "test").half_width is None, "of two seeds"
    assert comparison.summary_table([first, second])[2][0] == "resnet50: seed 2 failed"


def test_the_tables_are_written(tmp_path):
    networks = [
        with_accuracies("resnet18", 0.8, 0.9, 0.85),
        with_accuracies("a_b 50%", 0.7, 0.9, 0.8),
    ]
    comparison.write_comparison(networks, tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-1].startswith("Mean ± half of the 95 % interval (Student's t) over 3 seeds.")
    latex = (tmp_path / "comparison.tex").read_text()
    assert r"a\_b 50\% & 2.00 & 80.00 $\pm$ 24.84 &  & -5.00 $\pm$ 12.42 & 2.0 & 50 \\" in latex
    _, second = csv_rows(tmp_path)
    assert second["test accuracy (%): from"] == "55.16"
    assert second["test accuracy (%): to"] == "100.00"
    assert second["difference (points)"] == "-5.00"
    assert second["seeds"] == "3"


def test_a_line_of_a_terminal_is_replaced(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    line = StatusLine()
    for text in ("first", "first", "\x1b[1msecond\x1b[0m", "x" * 30):
        line.show(text)
    line.clear()
    shown = capsys.readouterr().out.split("\r")
    assert [part.rstrip() for part in shown] == ["", "first", "second", "x" * 19, "", ""]


def test_without_a_terminal_a_line_a_minute_is_printed(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(status_line, "time", Mock(monotonic=lambda: now))
    line = StatusLine()
    for seconds, text in enumerate(["a"] * 61 + ["b"] * 70):
        now = float(seconds)
        line.show(text)
    line.clear()
    assert capsys.readouterr().out == "a\nb\n"


def test_the_last_line_of_a_log_is_found(tmp_path):
    log = tmp_path / "fit.log"
    for content, last in (
        (b"", ""),
        (b"\n\n", ""),
        (b"a\nb \n\n", "b"),
        (b"\xff" * 5000, "\ufffd" * 4096),
    ):
        log.write_bytes(content)
        assert last_line(log) == last
