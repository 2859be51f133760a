"""What the benchmarks print and draw, from times and runs that are known."""

import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import TINY, run_fit, write_images
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import (
    audit,
    augment,
    files,
    memory_watch,
    peer_job,
    peer_report,
    peer_runs,
    peer_timm,
    peers,
    pipeline,
    recipes,
    settings,
    startup,
    turns,
)
from cifar_transfer.base.errors import UserError
from cifar_transfer.base.machine import cores


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


# Stands for a contestant of `benchmarks.peers`: prints what it was given, and two epochs.
FAKE_PEER = """
import os
print("threads", os.environ["OMP_NUM_THREADS"], "classes", len(os.listdir("images/train")))
print('PEER-EPOCH {"phase": "frozen", "images": 300, "seconds": 2.0, "accuracy": 0.5}')
print('PEER-EPOCH {"phase": "unfrozen", "images": 300, "seconds": 3.0, "accuracy": 0.75}')
"""


@pytest.fixture
def peer_options(tmp_path):
    """Options of `benchmarks.peers`: a few images, weights of ResNet18, a folder for results."""
    write_images(tmp_path / "photos/train", 8)
    write_images(tmp_path / "photos/test", 4)
    state = torchvision.models.resnet18().state_dict()
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "resnet18.pth")
    return [
        f"--root={tmp_path / 'photos'}",
        f"--weights={tmp_path / 'resnet18.pth'}",
        f"--out={tmp_path / 'out'}",
        "--device=cpu",
        "--cores=1",
    ]


def test_peers_take_turns_and_those_that_fail_are_told_of(
    peer_options, tmp_path, monkeypatch, capsys
):
    order = []

    def command(peer, job, timm_checkout):
        order.append((peer, job.seed))
        if peer == "torchvision":
            return [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"]
        return [sys.executable, "-c", FAKE_PEER]

    monkeypatch.setattr(peers, "command", command)
    num_cores = cores()
    options = [*peer_options, "--rounds=2", "--peers", "torchvision", "fast", "fit"]
    assert peers.main(options) == peers.FAILED
    assert cores() == num_cores
    assert order == [("fit", 0), ("fast", 0), ("torchvision", 0), ("fast", 1), ("fit", 1)]

    out = tmp_path / "out"
    printed = capsys.readouterr().out
    log = out / "torchvision-0.log"
    assert f"torchvision's loop failed; what it printed is in {log}." in printed
    assert log.read_text() == "out of memory\n"
    assert (out / "fit-1.log").read_text().startswith("threads 1 classes 2\n")
    assert re.search(
        r"^\| fit +\| +150 \(150 to 150\) \| 100 \(100 to 100\) +\| 75.00", printed, re.M
    )
    assert (out / "peers.md").read_text() in printed
    with (out / "peers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["contestant"], row["seed"], row["epoch"]) for row in rows] == [
        (peer, seed, epoch)
        for peer, seed in (("fit", "0"), ("fast", "0"), ("fast", "1"), ("fit", "1"))
        for epoch in ("1", "2")
    ]
    assert float(rows[0]["minutes"]) > 0
    assert int(rows[0]["peak_memory_bytes"]) > 0
    with Image.open(out / "peers.png") as picture:
        assert picture.size == (1650, 675)
    left = {path.name for path in out.iterdir()}
    logs = {f"{peer}-{seed}.log" for peer, seed in order}
    assert left == {"peers.csv", "peers.md", "peers.png", *logs}


def test_the_table_of_peers_has_medians_and_ranges():
    def run(seed, speed, accuracy):
        epochs = [
            peer_runs.Epoch("frozen", 1000, 1.0, 0.1, 0.5),
            peer_runs.Epoch("unfrozen", 1000, 1000 / speed, accuracy, 1.0 + seed),
        ]
        return peer_runs.PeerRun("fastai", seed, epochs, 2.0 + seed, 10**9)

    plain = peer_runs.PeerRun(
        "timm", 0, [peer_runs.Epoch("unfrozen", 10, 1.0, 0.5, 1.0)], 2.0, 5 * 10**8
    )
    _, fastai, timm = peer_report.table(
        [plain, run(0, 100, 0.5), run(1, 400, 0.7), run(2, 200, 0.6)]
    )
    assert fastai == [
        "fastai fine_tune",
        "1000 (1000 to 1000)",
        "200 (100 to 400)",
        "60.00 (50.00 to 70.00)",
        "2.00 (1.00 to 3.00)",
        "3.00 (2.00 to 4.00)",
        "1000 (1000 to 1000)",
    ]
    assert timm == ["timm train.py", "", "10", "50.00", "1.00", "2.00", "500"]


def test_peers_that_are_not_installed_are_left_out(peer_options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="No contestant is left"):
        peers.main([*peer_options, "--peers", "fastai", "timm"])
    assert capsys.readouterr().out == (
        "fastai is left out, because it is not installed.\n"
        "timm's train.py is left out, because no checkout of pytorch-image-models is named "
        "(--timm=PATH).\n"
    )
    with pytest.raises(UserError, match=r"has no train\.py: --timm takes a checkout"):
        peers.reasons_to_leave_out(tmp_path)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--root=nowhere", "nowhere has no folder train"),
        ("--weights=nowhere.pth", r"nowhere\.pth is no file"),
        ("--rounds=0", "--rounds is 0: take 1 or more"),
        ("--cores=1000000", "--cores is 1000000: take 1 to"),
        ("--batch_size=1", "--batch_size is 1: take 2 or more"),
        ("--lr=nan", "--lr is nan: take a positive number"),
        ("--workers=-1", "--workers is -1: take 0 or more"),
    ],
)
def test_options_of_peers_are_checked(option, sentence, peer_options):
    with pytest.raises(UserError, match=sentence):
        peers.parse([*peer_options, option])


def test_the_version_of_timms_checkout_is_told(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "version.py").write_text("__version__ = '1.0.31'\n")
    assert peers.peer_versions(["fit", "timm"], tmp_path) == {"timm": "1.0.31"}
    assert peers.peer_versions(["fit"], tmp_path) == {}


# Stands for timm's `train.py`, with the functions that are wrapped in a clock.
TRAIN = """
import sys
from types import SimpleNamespace

class Loader(list):
    loader = SimpleNamespace(batch_size=64)

def train_one_epoch(epoch, model, loader, optimizer, task=None):
    return {"loss": 1.0}

def validate(model, loader, loss):
    return {"top1": 62.5}

def main():
    assert "--lr=0.5" in sys.argv
    for epoch in range(2):
        train_one_epoch(epoch, None, Loader([1, 2, 3]), None, task=None)
        validate(None, None, None)
"""


def test_timms_script_is_timed_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.argv", [])
    (tmp_path / "train.py").write_text(TRAIN)
    write_images(tmp_path / "train", 1)
    job = peer_job.PeerJob(
        root=str(tmp_path),
        weights="",
        image_size=32,
        batch_size=64,
        frozen_epochs=1,
        unfrozen_epochs=1,
        lr=0.5,
        workers=0,
        seed=0,
        device="cpu",
    )
    peer_timm.main(job, tmp_path)
    for line in capsys.readouterr().out.splitlines():
        values = json.loads(line.removeprefix(peer_job.EPOCH_MARK))
        seconds = values.pop("seconds")
        assert seconds >= 0
        assert values == {"phase": "unfrozen", "images": 3 * 64, "accuracy": 0.625}


def test_memory_of_processes_below_a_process_counts():
    inner = "block = bytearray(b'x') * 100_000_000; print('ready', flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        process.stdout.readline()
        assert memory_watch.tree_bytes(process.pid) > 100_000_000
        process.stdin.close()
    assert memory_watch.tree_bytes(process.pid) == 0


@pytest.fixture
def peer_job_of_options(peer_options):
    """What the contestants train, with those options and eight images a step."""
    options = peers.parse([*peer_options, "--batch_size=8", "--workers=0"])
    return peers.job_of(options)


def epochs_printed(text):
    """Return phase, images and number of right test images, of eight, of each epoch."""
    epochs = []
    for line in text.splitlines():
        if line.startswith(peer_job.EPOCH_MARK):
            values = json.loads(line.removeprefix(peer_job.EPOCH_MARK))
            assert values["seconds"] > 0
            epochs.append((values["phase"], values["images"], values["accuracy"] * 8))
    return epochs


@pytest.mark.parametrize("peer", ["lightning", "torchvision"])
def test_a_peer_trains_and_prints_its_epochs(
    peer, peer_job_of_options, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    _, _, module, job = peers.command(peer, peer_job_of_options, None)
    importlib.import_module(module).main(peer_job.PeerJob.from_json(job))
    frozen, unfrozen = epochs_printed(capfd.readouterr().out)
    assert frozen[:2] == ("unfrozen" if peer == "torchvision" else "frozen", 16)
    assert unfrozen[:2] == ("unfrozen", 16)
    assert frozen[2] in range(9)
    assert unfrozen[2] in range(9)


@pytest.mark.parametrize("peer", ["fit", "fast"])
def test_fit_is_a_peer_that_trains_and_prints_its_epochs(peer, peer_job_of_options, tmp_path):
    _, _, module, *options = peers.command(peer, peer_job_of_options, None)
    done = run_fit(tmp_path, *options, "--report.figures=false", module=module)
    frozen, unfrozen = epochs_printed(done.stdout)
    assert frozen[:2] == ("unfrozen" if peer == "fast" else "frozen", 16)
    assert unfrozen[:2] == ("unfrozen", 16)
    (config,) = tmp_path.glob("lightning_logs/*/config.yaml")
    augment = yaml.safe_load(config.read_text())["data"]["init_args"]["augment"]
    colours = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "degrees"), 0)
    chosen = {option: value for option, value in augment.items() if value is not None}
    assert chosen == {"preset": "cifar", **colours}


@pytest.mark.whole
def test_all_peers_run_in_processes_of_their_own(peer_options, tmp_path):
    checkout = Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.peers", *peer_options, "--rounds=1"]
    done = subprocess.run(
        [*command, "--batch_size=8"], cwd=checkout, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout
    with (tmp_path / "out" / "peers.csv").open() as file:
        contestants = {row["contestant"] for row in csv.DictReader(file)}
    assert contestants | {"fastai", "timm"} == {*peer_runs.PEERS}
