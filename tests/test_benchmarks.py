"""What the benchmarks print and draw, from times and runs that are known."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import audit, augment, files, pipeline, recipes, settings, startup, turns


def test_contestants_take_turns_and_the_first_round_does_not_count():
    calls = []
    times = turns.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, max_seconds=60
    )
    assert calls == list("ababbaab")
    assert [len(values) for values in times.values()] == [3, 3]


def test_no_round_begins_after_the_time_is_up():
    assert len(turns.alternate({"a": lambda: None}, rounds=1000, max_seconds=0)["a"]) == 1


def test_ratios_are_those_within_a_round():
    table = turns.table({"slow": [1.0, 2.0, 4.0], "fast": [0.5, 1.0, 1.0]}, images=10)
    slow, fast = table.splitlines()[2:]
    assert [cell.strip() for cell in slow.split("|")[1:-1]] == [
        "slow",
        "5",
        "4 to 8",
        "1.00",
        "1.00 to 1.00",
    ]
    assert [cell.strip() for cell in fast.split("|")[1:-1]] == [
        "fast",
        "10",
        "10 to 15",
        "2.00",
        "2.00 to 3.00",
    ]


@pytest.mark.whole
def test_recipes_are_run_once_evaluated_each_epoch_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.RECIPES, "fast", ["--model.schedule=linear"])
    options = [
        "--out",
        str(tmp_path),
        "--recipes",
        "fast",
        *TINY,
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=2",
    ]
    recipes.main(options)
    run = tmp_path / "fast-0" / "lightning_logs" / "version_0"
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    rates = [event.value for event in events.Scalars("lr-Adam")]
    assert rates == sorted(rates, reverse=True)
    points = recipes.curve(run)
    assert len(points) == 2
    assert 0 < points[0][0] < points[1][0]
    assert f"{points[1][1]:.2%}" in capsys.readouterr().out
    with Image.open(tmp_path / "recipes.png") as picture:
        assert picture.size == (1200, 675)
    monkeypatch.setattr(
        "subprocess.run", lambda *_, **__: pytest.fail("a finished run was started again")
    )
    recipes.main(options)


def test_the_training_loop_is_timed_in_both_phases(monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "STEPS_PER_TURN", 1)
    monkeypatch.setattr(pipeline, "COUNTED_TURNS", 2)
    monkeypatch.setattr(pipeline, "WARM_UP_TURNS", 1)
    monkeypatch.setattr(pipeline, "TUTORIAL_IMAGES", 64)
    options = ["--model.backbone=lenet5", "--trainer.accelerator=cpu", "--report.figures=false"]
    pipeline.main(options)
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+), \d+ threads, 32-true:$", printed, re.M) == ["frozen", "unfrozen"]
    assert len(re.findall(r"^\| (?:tutorial's loop|fit|floor) +\| +\d+ \|", printed, re.M)) == 6
    assert len(re.findall(r"^fit has \d+\.\d\d of the floor's images/s", printed, re.M)) == 2


def test_the_augmentation_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(augment, "MAX_ROUNDS", 2)
    monkeypatch.setattr(augment, "BATCH_SIZES", {32: 4, 96: 2})
    augment.main()
    printed = capsys.readouterr().out
    assert re.findall(r"batches of \d images, \d+ x \d+", printed) == [
        "batches of 4 images, 32 x 32",
        "batches of 2 images, 96 x 96",
    ]
    rows = re.findall(r"^\| (?:torchvision, .*|`Augment`, .*?) +\| +\d+ \|", printed, re.M)
    assert len(rows) == 8


@pytest.mark.slow
def test_each_setting_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(settings, "MAX_ROUNDS", 1)
    monkeypatch.setattr(settings, "BATCH_SIZE", 4)
    monkeypatch.setattr(settings, "EVALUATED_IMAGES", 256)
    monkeypatch.setattr(settings, "DEVICE", "cpu")
    settings.main([])
    rows = re.findall(r"^\| (\S.*?) +\|", capsys.readouterr().out, re.M)
    assert len(rows) == 6 + 4 + 5
    assert rows[0] == "as in fit"


@pytest.mark.whole
def test_the_start_is_timed_of_two_checkouts(monkeypatch, capsys):
    for name in ("IMPORTS", "PROGRAMS"):
        programs = getattr(startup, name)
        few = ("import torch", "fit --version", "fit, first letter", "fit, first step")
        chosen = {key: value for key, value in programs.items() if key in few}
        monkeypatch.setattr(startup, name, chosen)
    monkeypatch.setattr(startup, "MAX_ROUNDS", 1)
    startup.main([str(startup.THIS_CHECKOUT)])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == [
        "import torch",
        "fit --version",
        "fit --version, there",
        "fit, first letter",
        "fit, first letter, there",
        "fit, first step",
        "fit, first step, there",
    ]


@pytest.mark.whole
def test_data_parallelism_is_timed():
    command = [sys.executable, "-m", "benchmarks.ddp", "--rounds=1", "--backbone=lenet5"]
    checkout = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "DDP after the unfreezing" in done.stdout
    assert re.search(r"^efficiency of plain DDP: \d+% of twice that$", done.stdout, re.M)


def test_the_audit_is_scored_on_changed_labels_and_planted_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit, "COPIES", 2)
    options = ["--data=ShapesDataModule", "--data.train_images=150", "--data.test_images=40"]
    audit.main(["lenet5=none", "--features=kept", "--trainer.accelerator=cpu", *options])
    printed = capsys.readouterr().out
    assert re.search(r"^\| +\d+ \| +0\.\d\d \| +\d+ \| +\d+% +\| +\d+% +\|$", printed, re.M)
    for kind in audit.CHANGES:
        assert re.search(rf"^\| {kind} +\| +2 \| +[0-2] \|$", printed, re.M), kind


def test_average_precision_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    wrong = torch.tensor([True, False, True, False])
    assert audit.average_precision(scores, wrong) == pytest.approx((1 + 2 / 3) / 2)


def test_the_steps_to_the_first_of_many_files_are_timed(tmp_path):
    files.write_images(tmp_path, 400)
    heading, *rows = files.measure(tmp_path)
    assert [row[0] for row in rows] == ["listed", "compared and split", "first batch"]
    for row in rows:
        assert len(row) == len(heading)
        assert float(row[1]) >= 0
