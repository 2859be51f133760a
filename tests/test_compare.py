"""Comparing backbones, and the table of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import TINY, run_fit
from PIL import Image

from cifar_transfer.base.errors import UserError
from cifar_transfer.cli.recipes import check_recipe
from cifar_transfer.commands import compare
from cifar_transfer.network.contestant import parse_contestant, parse_contestants
from cifar_transfer.results import comparison

OPTIONS = [*TINY[2:], "--trainer.max_epochs=2"]
LENET = "lenet5=none"
SHUFFLENET = "shufflenet_v2_x0_5=none"
INCEPTION = "inception_v3=none"  # takes no images of 32 pixels


def csv_rows(folder):
    with (folder / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of three backbones, one of which failed: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    process = run_fit(folder, LENET, INCEPTION, SHUFFLENET, *OPTIONS, command="compare", expect=1)
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
    log = (out / "lenet5-from-scratch" / "fit.log").read_text()
    assert log.count("  2/2  ") == 1
    heading, lenet, inception, shufflenet = process.stdout.splitlines()[2:6]
    assert heading.split() == ["network", "val", "%", "test", "%", "minutes"]
    assert inception.endswith("  failed with exit status 2")
    rows = csv_rows(out)
    for line, row in ((lenet, rows[0]), (shufflenet, rows[2])):
        assert line.startswith(row["network"])
        columns = ("validation accuracy (%)", "test accuracy (%)", "training time (min)")
        assert line.split()[3:] == [row[column] for column in columns]
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
    commands = []

    def run(command, **_):
        commands.append(command)
        return Mock(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    backbones = parse_contestants([LENET, INCEPTION, SHUFFLENET])
    lenet, inception, shufflenet = compare.compare(backbones, OPTIONS, out)
    assert len(commands) == 1
    assert "--model.backbone=inception_v3" in commands[0]
    assert "--resume" not in commands[0], "a refused start has left no run"
    assert inception.failure == "failed with exit status 3"
    for network, row in ((lenet, before[0]), (shufflenet, before[2])):
        assert network.images_per_second == pytest.approx(float(row["images/s"]), abs=0.5)
    with pytest.raises(UserError, match="another recipe"):
        compare.compare(backbones, [*OPTIONS, "--model.lr=0.5"], out)


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
    folder = out / "shufflenet_v2_x0_5-from-scratch"
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
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: Mock(returncode=1))
    networks = compare.compare([first], [], tmp_path / "out")
    assert networks[0].failure
    message = r"lenet5-version_0-best holds results of another recipe .*: name another folder"
    with pytest.raises(UserError, match=message):
        compare.compare([second], [], tmp_path / "out")


def test_all_recipes_are_handed_on(tmp_path, monkeypatch):
    handed_on = []

    def record(backbones, fit_options, out):
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


def network(label, **result):
    backbone, _, weights = label.partition(", ")
    scratch = weights == "from scratch"
    return comparison.ComparedNetwork(backbone, label, scratch, result)


def test_a_value_that_a_result_does_not_have_is_an_empty_cell():
    lenet = network("lenet5, from scratch", parameters=61_706, seconds=90, images_per_second=9.6)
    assert comparison.table_row(lenet) == ["lenet5, from scratch", "0.06", "", "", "1.5", "10"]


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
